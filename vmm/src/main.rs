//! `bulkhead-vmm`: runs one VM for the sandbox that started it.
//!
//! It takes no options. Its control socket is descriptor 3, its last words go to standard error.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use bulkhead_protocol::control::{Channel, VMM_SOCKET_FD};
use bulkhead_vmm::{error_chain, machine, server};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{SockType, getsockopt, sockopt};

fn main() -> ExitCode {
    let started = machine::now();
    if let Some(argument) = std::env::args().nth(1) {
        if argument == "--version" {
            println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        eprintln!("bulkhead-vmm takes no argument but --version, not {argument:?}: a sandbox starts it");
        return ExitCode::from(2);
    }
    let Some(channel) = control_socket() else {
        eprintln!(
            "bulkhead-vmm: descriptor {VMM_SOCKET_FD} is not a control socket: a sandbox starts this program"
        );
        return ExitCode::from(2);
    };
    // Dies with the sandbox also when it is stuck, and leaves no memory image.
    // SAFETY: prctl with these constants takes no pointers.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
    }
    // Both come as errors of the write as well: a reader that has gone, and the end of the largest file (the guest
    // chooses where it writes).
    for ignored in [Signal::SIGPIPE, Signal::SIGXFSZ] {
        // SAFETY: ignoring a signal runs no handler.
        if let Err(errno) = unsafe { signal(ignored, SigHandler::SigIgn) } {
            eprintln!("bulkhead-vmm: cannot ignore {ignored}: {errno}");
            return ExitCode::FAILURE;
        }
    }
    // One heap for all threads: to give back memory of another one the C library looks into /proc, which there is none of
    // and which no thread's system calls allow. It also takes less memory.
    // SAFETY: no other thread allocates.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    match server::serve(&channel, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-vmm: {}", error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// The inherited socket, if that is what descriptor 3 is.
fn control_socket() -> Option<Channel> {
    // SAFETY: fcntl only asks whether the descriptor exists.
    if unsafe { libc::fcntl(VMM_SOCKET_FD, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it exists, and nothing else in this process knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(VMM_SOCKET_FD) };
    let kind = getsockopt(&fd, sockopt::SockType).ok()?;
    // SAFETY: prevents nothing but inheritance by a program this process never starts.
    unsafe { libc::fcntl(VMM_SOCKET_FD, libc::F_SETFD, libc::FD_CLOEXEC) };
    (kind == SockType::SeqPacket).then(|| Channel::from(fd))
}
