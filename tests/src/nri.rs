//! A plugin of containerd's Node Resource Interface: it changes what containers are created with before the runtime
//! sees the specification, changes limits later, and hears of everything.
//!
//! One connection carries two ttrpc connections, one for each direction, in frames of eight bytes (number of the
//! connection, length) and the bytes.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use protobuf::Message;
use ttrpc::proto::{MESSAGE_TYPE_REQUEST, MessageHeader, Request, Response, Status};

/// The interface's messages. See `proto/nri.proto`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used
)]
#[allow(nonstandard_style, unused)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/nri.rs"));
}

use api::*;

/// Numbers of the connections in the frames.
const OF_PLUGIN: u32 = 1;
const OF_RUNTIME: u32 = 2;

/// Names of the events by their numbers less one.
const EVENTS: [&str; 11] = [
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "CreateContainer",
    "PostCreateContainer",
    "StartContainer",
    "PostStartContainer",
    "UpdateContainer",
    "PostUpdateContainer",
    "StopContainer",
    "RemoveContainer",
];

/// Something the plugin was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Name of the event, as in [`EVENTS`], or `Synchronize`.
    pub event: String,
    /// Ids of the pods and containers it is about.
    pub ids: Vec<String>,
}

/// A connected plugin. It leaves when it is dropped.
#[derive(Debug)]
pub struct Plugin {
    stream: UnixStream,
    told: Arc<Mutex<Vec<Told>>>,
    answers: mpsc::Receiver<(u32, Response)>,
    limit: Duration,
    calls: u32,
    reader: Option<JoinHandle<()>>,
}

impl Plugin {
    /// Registers at the runtime; every container created from now on is adjusted.
    ///
    /// # Panics
    /// If the runtime does not take it within `limit`.
    #[must_use]
    pub fn connect(socket: &Path, adjust: &ContainerAdjustment, limit: Duration) -> Self {
        let stream =
            UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        let told = Arc::new(Mutex::new(Vec::new()));
        let (sender, answers) = mpsc::channel();
        let serving = Serving {
            stream: stream.try_clone().expect("a descriptor"),
            told: told.clone(),
            adjust: adjust.clone(),
            answers: sender,
        };
        let reader = thread::spawn(move || {
            let ended = serving.serve();
            if let Err(error) = ended
                && error.kind() != io::ErrorKind::UnexpectedEof
            {
                eprintln!("the plugin's connection: {error}");
            }
        });
        let mut plugin = Self {
            stream,
            told,
            answers,
            limit,
            calls: 0,
            reader: Some(reader),
        };
        let register = RegisterPluginRequest {
            plugin_name: "bulkhead-tests".into(),
            plugin_idx: "10".into(),
            ..Default::default()
        };
        let _: Vec<u8> = plugin.call("RegisterPlugin", &register);
        let ready = crate::fixture::wait_until(limit, || plugin.was_told("Synchronize", ""));
        assert!(ready, "the runtime has not synchronized the plugin");
        plugin
    }

    /// Everything the plugin was told so far.
    #[must_use]
    pub fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the plugin was told of an event of the pod or container `id`; empty: of any.
    #[must_use]
    pub fn was_told(&self, event: &str, id: &str) -> bool {
        self.told()
            .iter()
            .any(|told| told.event == event && (id.is_empty() || told.ids.iter().any(|of| of == id)))
    }

    /// Changes limits of a container that is there.
    ///
    /// # Panics
    /// If the runtime refuses or fails.
    pub fn update(&mut self, container: &str, resources: LinuxResources) {
        let request = UpdateContainersRequest {
            update: vec![ContainerUpdate {
                container_id: container.to_owned(),
                linux: Some(LinuxContainerUpdate {
                    resources: Some(resources).into(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let answer = self.call("UpdateContainers", &request);
        let answer = UpdateContainersResponse::parse_from_bytes(&answer).expect("a response");
        assert!(answer.failed.is_empty(), "{answer:?}");
    }

    fn call(&mut self, method: &str, message: &impl Message) -> Vec<u8> {
        // A client's numbers are odd.
        let stream_id = 2 * self.calls + 1;
        self.calls += 1;
        let request = Request {
            service: "nri.pkg.api.v1alpha1.Runtime".into(),
            method: method.into(),
            payload: message.write_to_bytes().expect("a message"),
            timeout_nano: i64::try_from(self.limit.as_nanos()).expect("a short time"),
            ..Default::default()
        };
        let payload = request.write_to_bytes().expect("a message");
        let header = MessageHeader::new_request(stream_id, length(&payload));
        send(&self.stream, OF_RUNTIME, header, &payload).unwrap_or_else(|error| panic!("{method}: {error}"));
        let (answered, response) = self
            .answers
            .recv_timeout(self.limit)
            .unwrap_or_else(|error| panic!("{method}: {error}"));
        assert_eq!(answered, stream_id);
        let status = response.status.unwrap_or_default();
        assert_eq!(status.code.value(), 0, "{method}: {}", status.message);
        response.payload
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        // The reader ends with the connection.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

struct Serving {
    stream: UnixStream,
    told: Arc<Mutex<Vec<Told>>>,
    adjust: ContainerAdjustment,
    answers: mpsc::Sender<(u32, Response)>,
}

impl Serving {
    fn serve(&self) -> io::Result<()> {
        // A message can come in several frames.
        let mut received = [Vec::new(), Vec::new()];
        loop {
            let mut header = [0; 8];
            (&self.stream).read_exact(&mut header)?;
            let [connection, length] = [0, 4]
                .map(|at| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
            let mut bytes = vec![0; length as usize];
            (&self.stream).read_exact(&mut bytes)?;
            let buffer = match connection {
                OF_PLUGIN => &mut received[0],
                OF_RUNTIME => &mut received[1],
                _ => return Err(io::Error::other(format!("connection {connection}"))),
            };
            buffer.extend(bytes);
            while let Some((header, payload)) = next(buffer) {
                if header.type_ == MESSAGE_TYPE_REQUEST {
                    self.answer(header.stream_id, &payload)?;
                } else {
                    let response = Response::parse_from_bytes(&payload)?;
                    // Nobody waits any more: the plugin is being dropped.
                    let _ = self.answers.send((header.stream_id, response));
                }
            }
        }
    }

    fn answer(&self, stream_id: u32, payload: &[u8]) -> io::Result<()> {
        let request = Request::parse_from_bytes(payload)?;
        let payload = match request.method.as_str() {
            "Configure" => ConfigureResponse {
                events: (1 << EVENTS.len()) - 1,
                ..Default::default()
            }
            .write_to_bytes()?,
            "CreateContainer" => CreateContainerResponse {
                adjust: Some(self.adjust.clone()).into(),
                ..Default::default()
            }
            .write_to_bytes()?,
            _ => Vec::new(),
        };
        let response = Response {
            status: Some(Status::default()).into(),
            payload,
            ..Default::default()
        };
        let payload = response.write_to_bytes()?;
        let header = MessageHeader::new_response(stream_id, length(&payload));
        // Told first: who waits for the effect of an answer finds what it was an answer to.
        self.note(&request)?;
        send(&self.stream, OF_PLUGIN, header, &payload)
    }

    fn note(&self, request: &Request) -> io::Result<()> {
        let (event, ids) = match request.method.as_str() {
            "Synchronize" => {
                let now = SynchronizeRequest::parse_from_bytes(&request.payload)?;
                let pods = now.pods.iter().map(|pod| pod.id.clone());
                let ids = pods.chain(now.containers.iter().map(|container| container.id.clone()));
                ("Synchronize".to_owned(), ids.collect())
            }
            "StateChange" => {
                let change = StateChangeEvent::parse_from_bytes(&request.payload)?;
                let number = usize::try_from(change.event - 1).ok();
                let name = number
                    .and_then(|number| EVENTS.get(number))
                    .copied()
                    .unwrap_or("unknown");
                (
                    name.to_owned(),
                    vec![change.pod.id.clone(), change.container.id.clone()],
                )
            }
            // The others begin with the pod and the container in the same fields.
            other => {
                let about = CreateContainerRequest::parse_from_bytes(&request.payload).unwrap_or_default();
                (
                    other.to_owned(),
                    vec![about.pod.id.clone(), about.container.id.clone()],
                )
            }
        };
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.push(Told { event, ids });
        Ok(())
    }
}

/// Takes the first whole message off what was received.
fn next(received: &mut Vec<u8>) -> Option<(MessageHeader, Vec<u8>)> {
    const HEADER: usize = ttrpc::proto::MESSAGE_HEADER_LENGTH;
    let header = MessageHeader::from(received.get(..HEADER)?);
    let end = HEADER + header.length as usize;
    let payload = received.get(HEADER..end)?.to_vec();
    received.drain(..end);
    Some((header, payload))
}

fn send(mut stream: &UnixStream, connection: u32, header: MessageHeader, payload: &[u8]) -> io::Result<()> {
    let header = Vec::from(header);
    let mut frame = connection.to_be_bytes().to_vec();
    frame.extend(length(&header).wrapping_add(length(payload)).to_be_bytes());
    frame.extend(header);
    frame.extend(payload);
    stream.write_all(&frame)
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("messages are short")
}
