//! The shim's end of the agent's connection, with a guest at the other that answers as it likes.
//!
//! The program plays its own VMM: started as `bulkhead-vmm` it only waits. Time is virtual, so that a guest that
//! never answers costs none. A finding is, besides a fault or a panic, a call that does not end, an error text that
//! is long or has control characters in it, and memory that grows with what the guest says.

#![no_main]

use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::Arbitrary;
use bulkhead_protocol::agent as proto;
use bulkhead_sandbox::Error;
use bulkhead_sandbox::agent::Agent;
use bulkhead_sandbox::vm::Vm;
use libfuzzer_sys::fuzz_target;
use protobuf::Message;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Longest text of the guest in an error, in bytes.
const LONGEST: usize = 8 << 10;

/// Types of a ttrpc message: request, response, data.
const RESPONSE: u8 = 2;

#[derive(Arbitrary, Debug)]
enum Call {
    Hello,
    Setup,
    Events,
    Create,
    Start,
    Stats,
    Processes,
    Signal,
    Shutdown,
}

#[derive(Arbitrary, Debug)]
enum Payload {
    Bytes(Vec<u8>),
    /// A status: code and message.
    Status(u8, String),
    Long(u8, u32),
    Hello(u32, String),
    Stats(Vec<(String, u64)>, u64, u64),
    Processes(Vec<(u32, String)>),
    Exited(String, String, u32, u64),
    OutOfMemory(String),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Call(Call),
    Frame {
        /// Of the calls made so far, or any.
        stream: Result<u8, u32>,
        kind: Option<u8>,
        flags: u8,
        payload: Payload,
        /// What the header says instead of the length.
        wrong_len: Option<u32>,
    },
    Bytes(Vec<u8>),
    Wait,
}

#[derive(Arbitrary, Debug)]
struct Case {
    steps: Vec<Step>,
    /// The guest closes the connection in the end.
    closes: bool,
}

fn varint(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut all = vec![number << 3 | 2];
    varint(bytes.len() as u64, &mut all);
    all.extend(bytes);
    all
}

/// `Response` of ttrpc: status, payload.
fn response(payload: &[u8]) -> Vec<u8> {
    field(2, payload)
}

fn body(payload: &Payload, kind: u8) -> Vec<u8> {
    let message: Box<dyn protobuf::MessageDyn> = match payload {
        Payload::Bytes(bytes) => return bytes.clone(),
        Payload::Status(code, text) => {
            let mut status = vec![8, code % 18];
            status.extend(field(2, text.as_bytes()));
            return field(1, &status);
        }
        Payload::Long(byte, len) => return vec![*byte; *len as usize % (5 << 20)],
        Payload::Hello(version, release) => Box::new(proto::HelloResponse {
            version: *version,
            kernel_release: release.clone(),
            ..Default::default()
        }),
        Payload::Stats(values, current, most) => Box::new(proto::ContainerStatsResponse {
            cpu: values.iter().cloned().collect(),
            memory_stat: values.iter().cloned().collect(),
            memory_current: *current,
            memory_max: *most,
            ..Default::default()
        }),
        Payload::Processes(processes) => {
            let process = |(pid, exec): &(u32, String)| proto::ContainerProcess {
                pid: *pid,
                exec_id: exec.clone(),
                ..Default::default()
            };
            Box::new(proto::ListProcessesResponse {
                processes: processes.iter().map(process).collect(),
                ..Default::default()
            })
        }
        Payload::Exited(container, exec, status, at) => {
            let mut event = proto::Event::new();
            event.set_exited(proto::ProcessExited {
                container_id: container.clone(),
                exec_id: exec.clone(),
                exit_status: *status,
                exited_at_ns: *at,
                ..Default::default()
            });
            Box::new(event)
        }
        Payload::OutOfMemory(container) => {
            let mut event = proto::Event::new();
            event.set_oom(proto::OutOfMemory {
                container_id: container.clone(),
                ..Default::default()
            });
            Box::new(event)
        }
    };
    let bytes = message.write_to_bytes_dyn().expect("it can be written");
    // A message of a stream has no wrapping.
    if kind == RESPONSE { response(&bytes) } else { bytes }
}

fn frame(stream: u32, kind: u8, flags: u8, payload: &[u8], wrong_len: Option<u32>) -> Vec<u8> {
    let len = wrong_len.unwrap_or(payload.len() as u32);
    let mut frame = [len.to_be_bytes(), stream.to_be_bytes()].concat();
    frame.extend([kind, flags]);
    frame.extend(payload);
    frame
}

fn check<T>(result: Result<T, Error>) {
    if let Err(error) = result {
        let text = bulkhead_sandbox::error::chain(&error);
        assert!(text.len() <= LONGEST, "an error of {} bytes", text.len());
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

fn call(agent: &Agent, call: &Call) -> JoinHandle<()> {
    let agent = agent.clone();
    let limit = Duration::from_secs(10);
    match call {
        Call::Hello => tokio::spawn(async move { check(agent.hello(limit).await) }),
        Call::Setup => {
            tokio::spawn(async move { check(agent.setup_sandbox(&Default::default(), limit).await) })
        }
        Call::Events => tokio::spawn(async move {
            let events = agent.events().await;
            tokio::time::sleep(limit).await;
            check(events);
        }),
        Call::Create => tokio::spawn(async move { check(agent.create_container(&Default::default()).await) }),
        Call::Start => tokio::spawn(async move { check(agent.start_container(&Default::default()).await) }),
        Call::Stats => tokio::spawn(async move {
            let stats = agent.container_stats(&Default::default()).await;
            check(stats.map(|stats| assert!(stats.compute_size() <= 4 << 20)));
        }),
        Call::Processes => {
            tokio::spawn(async move { check(agent.list_processes(&Default::default()).await) })
        }
        Call::Signal => tokio::spawn(async move { check(agent.signal_process(&Default::default()).await) }),
        Call::Shutdown => tokio::spawn(async move { check(agent.shutdown(&Default::default()).await) }),
    }
}

/// Sends as much as the shim takes; whether that was all.
async fn transmit(far: &tokio::net::UnixStream, mut bytes: &[u8]) -> bool {
    for _ in 0..2000 {
        match far.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        if bytes.is_empty() {
            return true;
        }
        tokio::task::yield_now().await;
    }
    false
}

async fn run(vm: Vm, case: Case) {
    let (near, far) = UnixStream::pair().expect("there are descriptors");
    far.set_nonblocking(true).expect("it is a socket");
    let far = tokio::net::UnixStream::from_std(far).expect("there are descriptors");
    let agent = Agent::new(near.into(), vm, Duration::from_secs(5)).expect("it is a socket");
    let mut calls = Vec::new();
    for step in case.steps {
        match step {
            Step::Call(kind) => calls.push(call(&agent, &kind)),
            Step::Frame {
                stream,
                kind,
                flags,
                payload,
                wrong_len,
            } => {
                // Calls have odd numbers in their order.
                let stream = stream.map_or_else(|any| any, |index| 2 * (u32::from(index) % 8) + 1);
                let kind = kind.unwrap_or(RESPONSE);
                let bytes = frame(stream, kind, flags, &body(&payload, kind), wrong_len);
                if !transmit(&far, &bytes).await {
                    break;
                }
            }
            Step::Bytes(bytes) => {
                if !transmit(&far, &bytes).await {
                    break;
                }
            }
            Step::Wait => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        tokio::task::yield_now().await;
        // What was asked for is of no interest.
        let _ = far.try_read(&mut [0; 4096]);
    }
    let far = (!case.closes).then_some(far);
    drop(agent);
    for call in calls {
        let ended = tokio::time::timeout(Duration::from_secs(100), call).await;
        ended.expect("every call ends").expect("no call panics");
    }
    drop(far);
}

thread_local! {
    static RUNTIME: (Runtime, Vm) = {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("there are descriptors");
        let vm = runtime.block_on(async { Vm::fake() });
        (runtime, vm)
    };
}

fuzz_target!(|case: Case| {
    RUNTIME.with(|(runtime, vm)| runtime.block_on(run(vm.clone(), case)));
});
