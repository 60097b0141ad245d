//! Standard streams: each is a connection to the host, copied from or to a pipe or a terminal.
//!
//! A program gets pipes, not the vsock sockets themselves: opening `/dev/stdout` fails on a socket with `ENXIO`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::ports::HOST_CID;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr};
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::fd::AsyncFile;

/// How long the host has to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long output is read after a process has exited, when something else keeps its pipe open.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Bytes copied at once: the capacity of a pipe.
const CHUNK: usize = 64 * 1024;

/// Why streams could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No socket.
    #[error("cannot make a socket")]
    Socket(#[source] io::Error),
    /// The host does not listen.
    #[error("cannot connect to host port {port}")]
    Connect {
        /// Port dialled.
        port: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No pipe or null device.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// The terminal did not arrive or cannot be used.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
}

/// Where host ports are dialled.
#[derive(Clone, Debug)]
pub enum Host {
    /// Port N of the host's vsock.
    Vsock,
    /// Socket `N` in a directory, for tests without a VM.
    Unix(PathBuf),
}

impl Host {
    /// Connects to a port.
    ///
    /// # Errors
    /// The host refuses or does not answer within ten seconds.
    pub async fn dial(&self, port: u32) -> Result<AsyncFile, StreamError> {
        finish_dial(self.start_dial(port)?, port).await
    }

    /// Sends the connection request; the socket becomes writable when it is answered.
    ///
    /// # Errors
    /// There is no socket or the kernel refuses at once.
    pub fn start_dial(&self, port: u32) -> Result<AsyncFile, StreamError> {
        let family = match self {
            Self::Vsock => AddressFamily::Vsock,
            Self::Unix(_) => AddressFamily::Unix,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(family, SockType::Stream, flags, None)
            .map_err(|e| StreamError::Socket(e.into()))?;
        let connected = match self {
            Self::Vsock => connect(&fd, &VsockAddr::new(HOST_CID, port)),
            Self::Unix(directory) => {
                UnixAddr::new(&directory.join(port.to_string())).and_then(|address| connect(&fd, &address))
            }
        };
        match connected {
            Ok(()) | Err(Errno::EINPROGRESS) => AsyncFile::new(fd).map_err(StreamError::Socket),
            Err(error) => Err(StreamError::Connect {
                port,
                source: error.into(),
            }),
        }
    }
}

/// Waits for the answer to [`Host::start_dial`].
///
/// # Errors
/// The host refuses or does not answer within ten seconds.
pub async fn finish_dial(pending: AsyncFile, port: u32) -> Result<AsyncFile, StreamError> {
    let connect = |source| StreamError::Connect { port, source };
    match tokio::time::timeout(CONNECT_LIMIT, pending.writable()).await {
        Ok(result) => result.map_err(connect)?,
        Err(_) => return Err(connect(Errno::ETIMEDOUT.into())),
    }
    match socket::getsockopt(&pending, socket::sockopt::SocketError).map_err(|e| connect(e.into()))? {
        0 => Ok(pending),
        errno => Err(connect(io::Error::from_raw_os_error(errno))),
    }
}

fn connect(fd: &OwnedFd, address: &dyn SockaddrLike) -> nix::Result<()> {
    // SAFETY: the address is valid for its length while borrowed.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr(), address.len()) }).map(drop)
}

/// The host's end of one stream. It is another connection after a restore of the guest has reset the first one.
#[derive(Clone, Debug)]
pub struct HostEnd(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    current: Mutex<(AsyncFile, u64)>,
    replaced: Notify,
}

impl HostEnd {
    fn new(socket: AsyncFile) -> Self {
        Self(Arc::new(Shared {
            current: Mutex::new((socket, 0)),
            replaced: Notify::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, (AsyncFile, u64)> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection and its number.
    fn current(&self) -> (AsyncFile, u64) {
        self.lock().clone()
    }

    /// Goes on with another connection.
    pub fn replace(&self, socket: AsyncFile) {
        let mut current = self.lock();
        let number = current.1 + 1;
        let (old, _) = std::mem::replace(&mut *current, (socket, number));
        // Wakes whoever waits for it.
        old.shutdown_both();
        self.0.replaced.notify_one();
    }

    /// Waits for a connection with another number.
    async fn other_than(&self, number: u64) {
        while self.lock().1 == number {
            self.0.replaced.notified().await;
        }
    }

    /// Writes everything, or drops it: a program must not block or die because its log reader went away. `dead` is
    /// the number of a connection known to be broken.
    async fn deliver(&self, mut data: &[u8], dead: &mut Option<u64>) {
        loop {
            let (socket, number) = self.current();
            if *dead == Some(number) {
                return;
            }
            match socket.write_some(&mut data).await {
                Ok(()) => return,
                Err(_) if self.lock().1 != number => (),
                Err(_) => *dead = Some(number),
            }
        }
    }
}

/// The host's ends of a process's streams.
#[derive(Clone, Debug, Default)]
pub struct HostEnds {
    /// Standard input.
    pub stdin: Option<HostEnd>,
    /// Standard output.
    pub stdout: Option<HostEnd>,
    /// Standard error.
    pub stderr: Option<HostEnd>,
}

impl HostEnds {
    /// Dials every wanted stream.
    ///
    /// # Errors
    /// One of them cannot be connected.
    pub async fn dial(host: &Host, streams: &proto::Streams) -> Result<Self, StreamError> {
        let dial = async |port| match port {
            0 => Ok(None),
            port => host.dial(port).await.map(|socket| Some(HostEnd::new(socket))),
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            dial(streams.stdin_port),
            dial(streams.stdout_port),
            dial(streams.stderr_port)
        )?;
        Ok(Self {
            stdin,
            stdout,
            stderr,
        })
    }
}

/// The three descriptors a program starts with.
#[derive(Debug)]
pub struct ProgramEnds {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// Makes a pipe for each stream the host wants, `/dev/null` for the others. The pipes belong to the process's
/// user, who may then open `/dev/stdout`.
///
/// # Errors
/// Descriptors run out.
pub fn pipes(host: HostEnds, user: (u32, u32)) -> Result<(ProgramEnds, Copies), StreamError> {
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|e| StreamError::Pipe(e.into()));
    let own = |fd: &OwnedFd| {
        let (uid, gid) = (Uid::from_raw(user.0), Gid::from_raw(user.1));
        fchown(fd.as_raw_fd(), Some(uid), Some(gid)).map_err(|e| StreamError::Pipe(e.into()))
    };
    let null = || -> Result<OwnedFd, StreamError> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(StreamError::Pipe)?;
        Ok(file.into())
    };
    let mut copies = Copies::of(&host);
    let stdin = match host.stdin {
        None => null()?,
        Some(end) => {
            let (read, write) = pipe()?;
            own(&read)?;
            let write = AsyncFile::new(write).map_err(StreamError::Pipe)?;
            copies.input = Some(tokio::spawn(copy_input(end, write)));
            read
        }
    };
    let mut output = |end: Option<HostEnd>| match end {
        None => null(),
        Some(end) => {
            let (read, write) = pipe()?;
            own(&write)?;
            let read = AsyncFile::new(read).map_err(StreamError::Pipe)?;
            copies.outputs.push(tokio::spawn(copy_output(read, end)));
            Ok(write)
        }
    };
    let stdout = output(host.stdout)?;
    let stderr = output(host.stderr)?;
    Ok((
        ProgramEnds {
            stdin,
            stdout,
            stderr,
        },
        copies,
    ))
}

/// Joins the host's ends to the master side of a terminal.
pub fn terminal(host: HostEnds, master: &AsyncFile) -> Copies {
    let mut copies = Copies::of(&host);
    let input = |end| tokio::spawn(copy_input(end, master.clone()));
    copies.input = host.stdin.map(input);
    let output = |end| tokio::spawn(copy_output(master.clone(), end));
    copies.outputs.extend(host.stdout.map(output));
    copies
}

/// The tasks that copy a process's streams.
#[derive(Debug)]
pub struct Copies {
    ends: HostEnds,
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
}

impl Copies {
    fn of(ends: &HostEnds) -> Self {
        Self {
            ends: ends.clone(),
            input: None,
            outputs: Vec::new(),
        }
    }

    /// The ends that can be replaced.
    pub fn ends(&self) -> &HostEnds {
        &self.ends
    }

    /// Ends the copies of a process that has exited: input at once, output when all of it is with the host, at the
    /// latest after ten seconds.
    pub fn finish(mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let mut outputs = std::mem::take(&mut self.outputs);
        outputs.retain(|task| !task.is_finished());
        if !outputs.is_empty() {
            tokio::spawn(async move {
                let deadline = tokio::time::Instant::now() + DRAIN_LIMIT;
                for mut task in outputs {
                    if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                        task.abort();
                    }
                }
            });
        }
    }
}

impl Drop for Copies {
    /// Copies of a process that was never made.
    fn drop(&mut self) {
        for task in self.input.iter().chain(&self.outputs) {
            task.abort();
        }
    }
}

/// Copies what the host sends until the host ends it. After a connection that broke there may be another: the program
/// does not take a restore of its guest for the end of its input.
async fn copy_input(end: HostEnd, sink: AsyncFile) {
    loop {
        let (socket, number) = end.current();
        // Nothing that was read is given up for the next connection.
        let ready = tokio::select! {
            ready = socket.readable() => ready,
            () = end.other_than(number) => continue,
        };
        match ready.map(|()| socket) {
            Ok(socket) => match copy_what_is_there(&socket, &sink).await {
                After::More => (),
                After::End => {
                    socket.shutdown_both();
                    // The last reference to a pipe's write end goes here: the program sees the end of its input.
                    return;
                }
                After::Broken => end.other_than(number).await,
            },
            Err(_) => return,
        }
    }
}

/// What can be expected of a source.
enum After {
    More,
    End,
    Broken,
}

/// Copies until there is nothing to read at the moment. A sink that takes nothing more is an end as well.
async fn copy_what_is_there(source: &AsyncFile, sink: &AsyncFile) -> After {
    // Only for as long as there is data: an idle stream costs no buffer.
    let mut buffer = vec![0; CHUNK];
    loop {
        match source.try_read(&mut buffer) {
            Ok(0) => return After::End,
            Ok(n) => {
                let data = buffer.get(..n).unwrap_or_default();
                if sink.write_all(data).await.is_err() {
                    return After::End;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return After::More,
            Err(_) => return After::Broken,
        }
    }
}

/// Copies until the end of `source`. `EIO` is how a terminal's master tells that no process has it open.
async fn copy_output(source: AsyncFile, end: HostEnd) {
    let mut dead = None;
    'source: while source.readable().await.is_ok() {
        let mut buffer = vec![0; CHUNK];
        loop {
            match source.try_read(&mut buffer) {
                Ok(0) => break 'source,
                Ok(n) => end.deliver(buffer.get(..n).unwrap_or_default(), &mut dead).await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => break 'source,
            }
        }
    }
    end.current().0.shutdown_write();
}

/// Receives the master of a terminal over a connection to the console socket.
///
/// # Errors
/// No descriptor was sent.
pub async fn receive_master(connection: &UnixStream) -> Result<OwnedFd, StreamError> {
    let receive = || receive_descriptor(connection.as_raw_fd());
    connection
        .async_io(Interest::READABLE, receive)
        .await
        .map_err(StreamError::Terminal)
}

fn receive_descriptor(socket: i32) -> io::Result<OwnedFd> {
    let mut name = [0; 64];
    let mut parts = [io::IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = socket::MsgFlags::MSG_CMSG_CLOEXEC | socket::MsgFlags::MSG_DONTWAIT;
    let message = socket::recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let socket::ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(Errno::EBADMSG.into())
}

/// Prepares a terminal's master: size, and the user as owner of the slave, who may then open it by name.
///
/// # Errors
/// The descriptor is not a terminal's master.
pub fn prepare_master(master: OwnedFd, user: u32, size: (u32, u32)) -> Result<AsyncFile, StreamError> {
    let fail = StreamError::Terminal;
    let master = AsyncFile::new(master).map_err(fail)?;
    if size != (0, 0) {
        resize(&master, size).map_err(fail)?;
    }
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    let slave = unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    if slave < 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    fchown(slave.as_raw_fd(), Some(Uid::from_raw(user)), None).map_err(|e| fail(e.into()))?;
    Ok(master)
}

/// Sets a terminal's size in characters (width, height).
///
/// # Errors
/// The descriptor is not a terminal.
pub fn resize(master: &AsyncFile, (width, height): (u32, u32)) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: u16::try_from(height).unwrap_or(u16::MAX),
        ws_col: u16::try_from(width).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the structure is valid for reads.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
