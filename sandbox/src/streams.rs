//! Standard streams: joined by the VMM to descriptors of the host, without a copy in this process.

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::Streams as AgentStreams;
use bulkhead_protocol::control::{Fd, Request};
use bulkhead_protocol::ports;
use tokio::sync::watch;

use crate::vm::{Vm, VmError};

/// The host end of one stream.
pub struct Stream {
    /// Handed to the VMM.
    pub far_end: OwnedFd,
    /// Dropped when the stream is over: what keeps the other end of a FIFO from breaking, for one.
    pub keeper: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("far_end", &self.far_end)
            .finish_non_exhaustive()
    }
}

/// The host ends of a process's streams. With a terminal, stdin and stdout are its two directions.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Whether the guest makes a terminal.
    pub terminal: bool,
    /// Bytes to the process.
    pub stdin: Option<Stream>,
    /// Bytes from the process.
    pub stdout: Option<Stream>,
    /// Bytes from the process.
    pub stderr: Option<Stream>,
}

/// Streams of one process in the table.
#[derive(Debug)]
pub struct ProcessStreams {
    stdin: Option<u32>,
    outputs: Vec<u32>,
    open_outputs: watch::Receiver<usize>,
}

struct Open {
    keeper: Option<Box<dyn Any + Send>>,
    /// Counts the process's open outputs; absent for an input.
    outputs: Option<watch::Sender<usize>>,
}

/// All open streams of a sandbox, by host port.
#[derive(Default)]
pub struct StreamTable(Mutex<Inner>);

struct Inner {
    next_port: u32,
    open: HashMap<u32, Open>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            next_port: ports::FIRST_STREAM,
            open: HashMap::new(),
        }
    }
}

impl std::fmt::Debug for StreamTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamTable").finish_non_exhaustive()
    }
}

impl StreamTable {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers the streams with the VMM under fresh ports: what the agent is told, and the streams.
    ///
    /// # Errors
    /// The VMM's refusal; every stream is closed then.
    pub async fn open(
        &self,
        vm: &Vm,
        stdio: Stdio,
        size: Option<(u32, u32)>,
    ) -> Result<(AgentStreams, ProcessStreams), VmError> {
        let (sender, receiver) = watch::channel(0);
        let mut message = AgentStreams {
            terminal: stdio.terminal,
            ..AgentStreams::default()
        };
        if let Some((width, height)) = size {
            (message.width, message.height) = (width, height);
        }
        let mut streams = ProcessStreams {
            stdin: None,
            outputs: Vec::new(),
            open_outputs: receiver,
        };
        let mut listens = Vec::new();
        let ends = [(stdio.stdin, true), (stdio.stdout, false), (stdio.stderr, false)];
        for (number, (stream, is_input)) in ends.into_iter().enumerate() {
            let Some(stream) = stream else { continue };
            let port = self.add(stream.keeper, (!is_input).then(|| sender.clone()));
            match number {
                0 => (message.stdin_port, streams.stdin) = (port, Some(port)),
                1 => message.stdout_port = port,
                _ => message.stderr_port = port,
            }
            if !is_input {
                streams.outputs.push(port);
            }
            listens.push((port, stream.far_end));
        }
        // Also when nobody waits for the answer any more.
        let mut opening = Opening(self, Some(streams));
        for (port, far_end) in listens {
            let request = Request::VsockListen { port, far_end: Fd(0) };
            vm.ask(request, vec![far_end]).await?;
        }
        let streams = opening.1.take().ok_or(VmError::Gone)?;
        Ok((message, streams))
    }

    /// Registers a stream that belongs to no process: its port.
    ///
    /// # Errors
    /// The VMM's refusal; the stream is closed then.
    pub async fn open_one(&self, vm: &Vm, far_end: OwnedFd) -> Result<u32, VmError> {
        let port = self.add(None, None);
        let request = Request::VsockListen { port, far_end: Fd(0) };
        if let Err(error) = vm.ask(request, vec![far_end]).await {
            self.ended(port);
            return Err(error);
        }
        Ok(port)
    }

    fn add(&self, keeper: Option<Box<dyn Any + Send>>, outputs: Option<watch::Sender<usize>>) -> u32 {
        let mut inner = self.lock();
        let port = inner.next_port;
        // 2^32 - 2^16 streams in one sandbox's life: out of reach.
        inner.next_port = port.wrapping_add(1).max(ports::FIRST_STREAM);
        if let Some(outputs) = &outputs {
            outputs.send_modify(|open| *open += 1);
        }
        inner.open.insert(port, Open { keeper, outputs });
        port
    }

    /// Whether `port` is that of an open output of a process.
    pub fn is_output(&self, port: u32) -> bool {
        self.lock()
            .open
            .get(&port)
            .is_some_and(|open| open.outputs.is_some())
    }

    /// The stream of `port` is over.
    pub fn ended(&self, port: u32) {
        let open = self.lock().open.remove(&port);
        if let Some(Open { keeper, outputs }) = open {
            // The keeper goes first: who waits for the end of the outputs may look at the FIFO next.
            drop(keeper);
            if let Some(outputs) = outputs {
                outputs.send_modify(|open| *open = open.saturating_sub(1));
            }
        }
    }

    /// Every stream is over: the VM has ended.
    pub fn all_ended(&self) {
        let ports: Vec<u32> = self.lock().open.keys().copied().collect();
        for port in ports {
            self.ended(port);
        }
    }

    /// No more input will come: the process sees the end of its stdin once it has read what is there.
    pub fn close_stdin(&self, streams: &ProcessStreams) {
        let Some(port) = streams.stdin else { return };
        let keeper = self
            .lock()
            .open
            .get_mut(&port)
            .and_then(|open| open.keeper.take());
        drop(keeper);
    }

    /// Closes the host's side of all of a process's streams.
    pub fn close(&self, streams: &ProcessStreams) {
        for port in streams.ports() {
            self.ended(port);
        }
    }

    /// Waits until every byte the process has written is in the host's descriptors, at most `limit`;
    /// then gives up what is still open, and tells the VMM.
    pub async fn drain(&self, vm: Option<&Vm>, streams: &ProcessStreams, limit: Duration) {
        let mut open = streams.open_outputs.clone();
        if tokio::time::timeout(limit, open.wait_for(|open| *open == 0))
            .await
            .is_err()
            && let Some(vm) = vm
        {
            let lingering: Vec<u32> = {
                let inner = self.lock();
                streams
                    .outputs
                    .iter()
                    .copied()
                    .filter(|port| inner.open.contains_key(port))
                    .collect()
            };
            for port in lingering {
                if !limit.is_zero() {
                    log::warn!(
                        "a stream is still open {} s after its process's end: closing it",
                        limit.as_secs()
                    );
                }
                if let Err(error) = vm.ask(Request::VsockUnlisten { port }, Vec::new()).await {
                    log::warn!("{}", crate::error::chain(&error));
                }
            }
        }
        self.close(streams);
    }
}

/// Closes a process's streams again unless all of them were opened.
struct Opening<'a>(&'a StreamTable, Option<ProcessStreams>);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(streams) = self.1.take() {
            self.0.close(&streams);
        }
    }
}

impl ProcessStreams {
    fn ports(&self) -> impl Iterator<Item = u32> {
        self.stdin.iter().chain(&self.outputs).copied()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn draining_waits_for_outputs_only_and_keepers_go_with_their_stream() {
        let table = StreamTable::default();
        let (sender, receiver) = watch::channel(0);
        let alive = std::sync::Arc::new(());
        let keep = || Some(Box::new(alive.clone()) as Box<dyn Any + Send>);
        let stdin = table.add(keep(), None);
        let stdout = table.add(keep(), Some(sender.clone()));
        assert_ne!(stdin, stdout);
        assert!(stdin >= ports::FIRST_STREAM);
        let streams = ProcessStreams {
            stdin: Some(stdin),
            outputs: vec![stdout],
            open_outputs: receiver,
        };
        assert_eq!(std::sync::Arc::strong_count(&alive), 3);
        table.close_stdin(&streams);
        assert_eq!(std::sync::Arc::strong_count(&alive), 2);
        let mut open = streams.open_outputs.clone();
        let waited = tokio::time::timeout(Duration::from_millis(20), open.wait_for(|open| *open == 0));
        assert!(waited.await.is_err());
        assert!(table.is_output(stdout) && !table.is_output(stdin) && !table.is_output(ports::AGENT));
        table.ended(stdout);
        table.drain(None, &streams, Duration::from_secs(5)).await;
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
        assert!(table.lock().open.is_empty());
    }
}
