//! `binary://` logging: a program of the user's reads a container's output.
//!
//! It gets stdout on descriptor 3, stderr on 4, and says that it is ready by writing to or closing 5. Its
//! arguments are the URI's query; its environment holds the container's id and namespace only.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Stdio as ProcessStdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use super::*;

/// How long the program may take to get ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to end after the end of its input, and then after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(12);

/// Descriptors of the program, in the order of [`FIRST_FD`].
const FIRST_FD: RawFd = 3;

/// Numbers out of the way of the program's descriptors.
const SCRATCH_FD: RawFd = 64;

pub(super) struct LoggerStreams {
    pub stdout: Stream,
    pub stderr: Stream,
}

/// The program; when dropped it is given time to write what it has read, and then ended.
struct Logger(Option<Child>);

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            tokio::spawn(end(child));
        }
    }
}

/// The streams' writing ends are closed by now: the program sees the end of its input.
async fn end(mut child: Child) {
    if tokio::time::timeout(END_LIMIT, child.wait()).await.is_ok() {
        return;
    }
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(END_LIMIT, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

pub(super) async fn start(
    path: &Path,
    arguments: &[String],
    owner: Owner<'_>,
) -> Result<LoggerStreams, IoError> {
    let fail = |error| IoError::Logger(path.into(), error);
    let (out_reader, out_writer) = std::io::pipe().map_err(fail)?;
    let (err_reader, err_writer) = std::io::pipe().map_err(fail)?;
    let (ready_reader, ready_writer) = std::io::pipe().map_err(fail)?;
    let child = spawn(path, arguments, owner, [&out_reader, &err_reader], &ready_writer).map_err(fail)?;
    let logger = Arc::new(Logger(Some(child)));
    drop((out_reader, err_reader, ready_writer));

    let ready_reader = tokio::net::unix::pipe::Receiver::from_owned_fd(ready_reader.into()).map_err(fail)?;
    let mut ready_reader = ready_reader;
    let mut byte = [0];
    match tokio::time::timeout(READY_LIMIT, ready_reader.read(&mut byte)).await {
        // A byte, or the end of the pipe: both mean ready.
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(fail(error)),
        Err(_) => return Err(IoError::LoggerNotReady(path.into())),
    }
    let stream = |writer: PipeWriter| -> Result<Stream, IoError> {
        let far_end = OwnedFd::from(writer);
        nix::fcntl::fcntl(
            far_end.as_raw_fd(),
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .map_err(|errno| fail(errno.into()))?;
        Ok(Stream {
            far_end,
            keeper: Some(Box::new(Arc::clone(&logger))),
        })
    };
    Ok(LoggerStreams {
        stdout: stream(out_writer)?,
        stderr: stream(err_writer)?,
    })
}

fn spawn(
    path: &Path,
    arguments: &[String],
    owner: Owner<'_>,
    inputs: [&PipeReader; 2],
    ready: &PipeWriter,
) -> std::io::Result<Child> {
    let descriptors = [inputs[0].as_raw_fd(), inputs[1].as_raw_fd(), ready.as_raw_fd()];
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env_clear()
        .env("CONTAINER_ID", owner.container)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(ProcessStdio::null())
        .stdout(ProcessStdio::null())
        .stderr(ProcessStdio::null())
        .process_group(0);
    // SAFETY: the closure makes only async-signal-safe system calls on copied numbers.
    unsafe {
        command.pre_exec(move || {
            let mut copies = [-1; 3];
            for (copy, descriptor) in copies.iter_mut().zip(descriptors) {
                *copy =
                    nix::errno::Errno::result(libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, SCRATCH_FD))?;
            }
            for (number, copy) in (FIRST_FD..).zip(copies) {
                nix::errno::Errno::result(libc::dup2(copy, number))?;
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    // Unlike the shim it may be killed for lack of memory: it is another's program.
    if let Some(pid) = child.id()
        && let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0")
    {
        log::warn!("cannot set oom_score_adj of the logger: {error}");
    }
    Ok(child)
}
