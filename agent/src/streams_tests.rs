#![allow(clippy::unwrap_used)]
use nix::sys::socket::{SockFlag, SockType, socketpair};

use super::*;

/// The agent's end of a stream, and the host's.
fn stream() -> (AsyncFile, AsyncFile) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (agent, host) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    (AsyncFile::new(agent).unwrap(), AsyncFile::new(host).unwrap())
}

fn pipe() -> (AsyncFile, AsyncFile) {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    (AsyncFile::new(read).unwrap(), AsyncFile::new(write).unwrap())
}

/// Breaks a stream as a reset does: a socket closed with data that nobody has read resets its peer.
async fn break_off(agent: &AsyncFile, host: AsyncFile) {
    agent.write_all(b"x").await.unwrap();
    drop(host);
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn input_outlives_a_connection_that_broke() {
    let ((agent, host), (program, sink)) = (stream(), pipe());
    let end = HostEnd::new(agent.clone());
    let copy = tokio::spawn(copy_input(end.clone(), sink));
    host.write_all(b"one").await.unwrap();
    let mut buffer = [0; 16];
    assert_eq!(within(program.read(&mut buffer)).await.unwrap(), 3);

    break_off(&agent, host).await;
    let quiet = tokio::time::timeout(Duration::from_millis(50), program.read(&mut buffer)).await;
    assert!(quiet.is_err(), "the program has seen the end of its input");

    let (again, host) = stream();
    end.replace(again);
    host.write_all(b"two").await.unwrap();
    assert_eq!(within(program.read(&mut buffer)).await.unwrap(), 3);
    assert_eq!(&buffer[..3], b"two");
    host.shutdown_write();
    assert_eq!(within(program.read(&mut buffer)).await.unwrap(), 0);
    within(copy).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn output_is_dropped_until_somebody_reads_again() {
    let ((agent, host), (source, program)) = (stream(), pipe());
    let end = HostEnd::new(agent);
    let copy = tokio::spawn(copy_output(source, end.clone()));
    program.write_all(b"one").await.unwrap();
    let mut buffer = [0; 16];
    assert_eq!(within(host.read(&mut buffer)).await.unwrap(), 3);

    drop(host);
    // More than a pipe and a socket hold: the program is not stopped by it.
    within(program.write_all(&vec![1; 1 << 20])).await.unwrap();
    while !program_has_nothing_waiting(&program) {
        tokio::task::yield_now().await;
    }

    let (again, host) = stream();
    end.replace(again);
    program.write_all(b"two").await.unwrap();
    drop(program);
    assert_eq!(within(host.read(&mut buffer)).await.unwrap(), 3);
    assert_eq!(&buffer[..3], b"two");
    assert_eq!(within(host.read(&mut buffer)).await.unwrap(), 0);
    within(copy).await.unwrap();
}

fn program_has_nothing_waiting(pipe: &AsyncFile) -> bool {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int.
    unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    waiting == 0
}
