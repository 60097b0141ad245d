//! An agent that does as it is told, byte by byte.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bulkhead_protocol::agent::{Event, OutOfMemory, ProcessExited, event};
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader, Request, Response,
    Status,
};

use super::Agent;
use crate::vm::Vm;

/// The guest's end of the agent's stream.
pub(crate) struct Fake(pub UnixStream);

impl Fake {
    /// It and its client, whose requests have `limit` as their deadline.
    pub fn pair(vm: &Vm, limit: Duration) -> (Self, Agent) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let agent = Agent::new(theirs.into(), vm.clone(), limit).unwrap();
        (Self(UnixStream::from_std(ours).unwrap()), agent)
    }

    /// The next request: its stream and its method; `None` when the host has closed the connection.
    pub async fn request(&mut self) -> Option<(u32, String)> {
        let mut head = [0; MESSAGE_HEADER_LENGTH];
        self.0.read_exact(&mut head).await.ok()?;
        let header = MessageHeader::from(head);
        let mut payload = vec![0; header.length as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        let request = Request::parse_from_bytes(&payload).unwrap();
        Some((header.stream_id, request.method))
    }

    /// The next request, which must be of this method.
    pub async fn expect(&mut self, method: &str) -> u32 {
        let (id, asked) = self.request().await.unwrap();
        assert_eq!(asked, method);
        id
    }

    /// Sends raw bytes; whether the host took them.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).await.is_ok()
    }

    pub async fn answer(&mut self, id: u32, message: &impl Message) -> bool {
        self.send(&answer(id, Status::default(), message)).await
    }

    pub async fn refuse(&mut self, id: u32, code: Code, text: &str) -> bool {
        let status = Status {
            code: code.into(),
            message: text.into(),
            ..Status::default()
        };
        self.send(&answer(id, status, &Event::default())).await
    }

    pub async fn event(&mut self, id: u32, event: &Event) -> bool {
        self.send(&data(id, event)).await
    }
}

pub(crate) fn frame(mut header: MessageHeader, payload: &[u8]) -> Vec<u8> {
    header.length = u32::try_from(payload.len()).unwrap();
    let mut bytes = Vec::from(header);
    bytes.extend(payload);
    bytes
}

/// The head of a message that claims to have so many bytes.
pub(crate) fn head(id: u32, type_: u8, length: u32) -> Vec<u8> {
    let mut header = MessageHeader::new_response(id, length);
    header.type_ = type_;
    Vec::from(header)
}

fn answer(id: u32, status: Status, message: &impl Message) -> Vec<u8> {
    let response = Response {
        status: Some(status).into(),
        payload: message.write_to_bytes().unwrap(),
        ..Response::default()
    };
    let mut header = MessageHeader::new_response(id, 0);
    header.type_ = MESSAGE_TYPE_RESPONSE;
    frame(header, &response.write_to_bytes().unwrap())
}

pub(crate) fn data(id: u32, event: &Event) -> Vec<u8> {
    let mut header = MessageHeader::new_data(id, 0);
    header.type_ = MESSAGE_TYPE_DATA;
    frame(header, &event.write_to_bytes().unwrap())
}

pub(crate) fn oom(container: &str) -> Event {
    Event {
        kind: Some(event::Kind::Oom(OutOfMemory {
            container_id: container.into(),
            ..OutOfMemory::default()
        })),
        ..Event::default()
    }
}

pub(crate) fn exited(container: &str, exec: &str, status: u32) -> Event {
    Event {
        kind: Some(event::Kind::Exited(ProcessExited {
            container_id: container.into(),
            exec_id: exec.into(),
            pid: u32::MAX,
            exit_status: status,
            exited_at_ns: u64::MAX,
            ..ProcessExited::default()
        })),
        ..Event::default()
    }
}
