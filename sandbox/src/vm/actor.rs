//! The task that owns the control socket and watches the VMM process.

use std::collections::{HashMap, VecDeque};
use std::io::PipeReader;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use super::*;

/// Lines of the VMM's standard error kept for its obituary.
const KEPT_LINES: usize = 8;

/// Longest line kept, in bytes.
const LINE_LIMIT: u64 = 512;

/// Lines of it that are logged in a row, and the pause in which one more may come.
const LOGGED_LINES: u32 = 100;
const LOGGED_INTERVAL: Duration = Duration::from_millis(200);

pub(super) type Lines = Arc<Mutex<VecDeque<String>>>;

/// A request's name and who waits for its answer.
type Pending = (&'static str, oneshot::Sender<Result<Reply, VmError>>);

pub(super) struct Actor {
    pub channel: AsyncFd<Channel>,
    pub pidfd: AsyncFd<OwnedFd>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    pub pending: HashMap<u64, Pending>,
    pub next_id: u64,
    pub events: mpsc::UnboundedSender<VsockEvent>,
    pub exit: Option<Exit>,
    pub memory: watch::Sender<u32>,
    pub oom_kills_before: u64,
    pub cgroup: Option<Cgroup>,
    pub stderr: Lines,
    pub verdict: Arc<OnceLock<String>>,
}

impl Actor {
    /// Runs until the VMM process has ended and been reaped.
    pub async fn run(mut self) -> VmEnd {
        let mut channel_open = true;
        let mut commands_open = true;
        loop {
            tokio::select! {
                biased;
                ready = self.channel.readable(), if channel_open => match ready {
                    Ok(mut guard) => {
                        let received = guard.get_inner().receive::<VmmMessage>();
                        match received {
                            Ok(received) => self.take(received.message),
                            Err(ChannelError::WouldBlock) => guard.clear_ready(),
                            Err(ChannelError::Closed) => channel_open = false,
                            Err(error) => {
                                // A VMM that sends garbage is broken or taken over.
                                log::error!("killing the VMM: {}", crate::error::chain(&error));
                                channel_open = false;
                                self.kill();
                            }
                        }
                    }
                    Err(_) => channel_open = false,
                },
                ready = self.pidfd.readable() => {
                    if let Ok(mut guard) = ready {
                        guard.clear_ready();
                    }
                    match spawn::reap(self.pidfd.get_ref().as_fd()) {
                        Ok(None) => {}
                        Ok(Some(ending)) => {
                            self.drain();
                            return self.obituary(Some(ending));
                        }
                        Err(_) => return self.obituary(None),
                    }
                },
                command = self.commands.recv(), if commands_open => match command {
                    Some(command) => self.send(command).await,
                    // The last handle is gone: nobody wants the VM any more.
                    None => {
                        commands_open = false;
                        self.kill();
                    }
                },
            }
        }
    }

    fn kill(&self) {
        let _ = spawn::pidfd_kill(self.pidfd.get_ref());
    }

    /// Takes what the VMM sent before it ended.
    fn drain(&mut self) {
        loop {
            let received = self.channel.get_ref().receive::<VmmMessage>();
            match received {
                Ok(received) => self.take(received.message),
                Err(_) => return,
            }
        }
    }

    fn take(&mut self, message: VmmMessage) {
        match message {
            VmmMessage::Reply { id, result } => {
                let Some((request, reply)) = self.pending.remove(&id) else {
                    // A VMM that sends garbage is broken or taken over.
                    log::error!("killing the VMM: it answered request {id}, which was not made");
                    self.kill();
                    return;
                };
                let result = result.map_err(|message| VmError::Refused {
                    request,
                    message: limits::text(&message, limits::TEXT),
                });
                // The asker may have given up.
                let _ = reply.send(result);
            }
            VmmMessage::Event(Event::VsockConnected { port }) => self.tell(VsockEvent::Connected(port)),
            VmmMessage::Event(Event::VsockFirstData { port, monotonic_us }) => {
                self.tell(VsockEvent::FirstData(port, monotonic_us));
            }
            VmmMessage::Event(Event::VsockClosed { port }) => self.tell(VsockEvent::Closed(port)),
            VmmMessage::Event(Event::MemorySize { mib }) => {
                self.memory.send_replace(mib);
            }
            VmmMessage::Event(Event::Exited(exit)) => self.exit = Some(exit),
        }
    }

    fn tell(&self, event: VsockEvent) {
        // Only a sandbox on its way out does not listen.
        let _ = self.events.send(event);
    }

    async fn send(&mut self, command: Command) {
        let Command {
            request,
            descriptors,
            reply,
        } = command;
        let request_name = name(&request);
        let id = self.next_id;
        self.next_id += 1;
        let message = RequestMessage { id, request };
        let fds: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        loop {
            let sent = self.channel.get_ref().send(&message, &fds);
            match sent {
                Ok(()) => {
                    self.pending.insert(id, (request_name, reply));
                    return;
                }
                Err(ChannelError::WouldBlock) => match self.channel.writable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => return,
                },
                // The VMM is ending, or has no use without its end of the socket. How it ended says more than this
                // does: the answer is left to that.
                Err(ChannelError::Closed) => {
                    self.kill();
                    self.pending.insert(id, (request_name, reply));
                    return;
                }
                Err(error) => {
                    let _ = reply.send(Err(VmError::Send {
                        request: request_name,
                        error,
                    }));
                    return;
                }
            }
        }
    }

    /// Says how the VM ended.
    fn obituary(self, ending: Option<Ending>) -> VmEnd {
        if let Some(exit) = self.exit {
            return VmEnd {
                reason: limits::text(&exit.reason.to_string(), limits::TEXT),
                orderly: exit.reason == bulkhead_protocol::control::ExitReason::PowerOff,
                console: console::tail(&exit.console),
                ..VmEnd::default()
            };
        }
        if let Some(reason) = self.verdict.get() {
            return VmEnd {
                reason: reason.clone(),
                ..VmEnd::default()
            };
        }
        let oom = self.cgroup.as_ref().map_or(0, Cgroup::oom_kills) > self.oom_kills_before;
        let mut reason = match ending {
            Some(Ending::Killed(libc::SIGKILL)) if oom => {
                "VMM killed by the host: the pod's cgroup is out of memory".to_owned()
            }
            // A file that was mapped has become shorter: the root image, or the kernel's while it was loaded.
            Some(Ending::Killed(libc::SIGBUS)) => {
                "VMM killed by signal 7 (SIGBUS): the root image was truncated, or cannot be read".to_owned()
            }
            Some(Ending::Killed(libc::SIGSYS)) => {
                "VMM killed for a system call its filter does not allow (SIGSYS; the host's audit log or kernel log names the \
                 call: type=1326, comm and syscall)"
                    .to_owned()
            }
            Some(Ending::Killed(signal)) => format!("VMM killed by signal {signal}"),
            Some(Ending::Exited(status)) => format!("VMM exited with status {status}"),
            None => "VMM ended".to_owned(),
        };
        let lines = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        if !lines.is_empty() {
            reason.push_str(": ");
            reason.push_str(&lines.iter().map(String::as_str).collect::<Vec<_>>().join(" | "));
        }
        VmEnd {
            reason,
            out_of_memory: oom,
            ..VmEnd::default()
        }
    }
}

/// Logs the VMM's standard error line by line and keeps the last lines.
pub(super) fn read_stderr(pipe: PipeReader) -> std::io::Result<Lines> {
    let lines = Lines::default();
    let kept = Arc::clone(&lines);
    let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe.into())?;
    tokio::spawn(async move {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        let mut throttle = limits::Throttle::new(LOGGED_LINES, LOGGED_INTERVAL);
        loop {
            line.clear();
            // A longer line comes in pieces: the VMM decides nothing about this process's memory.
            match (&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text = limits::text(String::from_utf8_lossy(&line).trim_end(), limits::TEXT);
            match throttle.pass(std::time::Instant::now()) {
                Some(0) => log::warn!("vmm: {text}"),
                Some(lines) => log::warn!("vmm: ({lines} lines left out) {text}"),
                None => {}
            }
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() == KEPT_LINES {
                kept.pop_front();
            }
            kept.push_back(text);
        }
    });
    Ok(lines)
}
