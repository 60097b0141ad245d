//! Boots a VM without a sandbox and prints what becomes of it: a tool for working on the VMM.
//!
//! ```text
//! cargo run --release -p bulkhead-vmm --example boot -- [--until-agent] [--stream PORT:SOCKET …] \
//!     VMM KERNEL ROOT [MEMORY_MIB [VCPUS [PARAMETER …]]]
//! ```
//!
//! A stream awaits the agent's connection, so a healthy guest shows `VsockConnected`, and the time from the start of
//! the VMM's process to it. The VM ends after ten seconds if it does not before; with `--until-agent` at that moment.
//! `--stream` connects to a Unix socket and joins the guest's first connection to the host's port to it.

use std::error::Error;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use bulkhead_protocol::control::{
    Channel, Event, Fd, Request, RequestMessage, Start, VERSION, VMM_PROC_FD, VMM_SOCKET_FD, VmConfig,
    VmmMessage,
};
use bulkhead_protocol::ports;

const USAGE: &str =
    "usage: boot [--until-agent] [--stream PORT:SOCKET …] VMM KERNEL ROOT [MEMORY_MIB [VCPUS [PARAMETER …]]]";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let mut until_agent = false;
    let mut streams = Vec::new();
    while let Some(option) = arguments.next_if(|argument| argument.starts_with("--")) {
        match option.as_str() {
            "--until-agent" => until_agent = true,
            "--stream" => {
                let stream = arguments.next().ok_or(USAGE)?;
                let (port, socket) = stream.split_once(':').ok_or(USAGE)?;
                let stream = UnixStream::connect(socket).map_err(|error| format!("{socket}: {error}"))?;
                streams.push((port.parse()?, stream));
            }
            _ => return Err(USAGE.into()),
        }
    }
    let arguments: Vec<String> = arguments.collect();
    let [vmm, kernel, root, rest @ ..] = &arguments[..] else {
        return Err(USAGE.into());
    };
    let number = |index: usize, default: u32| rest.get(index).map_or(Ok(default), |text| text.parse());
    let memory_mib = number(0, 128)?;
    let vcpus = number(1, 1)?.try_into()?;
    let (ours, theirs) = Channel::pair()?;
    // The VMM serves its root directory, here an empty one, and starts by descriptor, as no path leads to it from there.
    let share = std::env::temp_dir().join(format!("bulkhead-boot-{}", std::process::id()));
    std::fs::create_dir(&share)?;
    let share_path = CString::new(share.as_os_str().as_bytes())?;
    let program = File::open(vmm)?;
    let mut command = Command::new(vmm);
    let fd = theirs.as_raw_fd();
    // SAFETY: system calls that are async-signal-safe and need no memory; the pointers are to C strings that live as long
    // as the closure, or to lists that end with null.
    unsafe {
        command.pre_exec(move || {
            let files = libc::open(c"/proc/self/fd".as_ptr(), libc::O_PATH | libc::O_CLOEXEC);
            let program = libc::fcntl(program.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100);
            let socket = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100);
            libc::dup2(files, VMM_PROC_FD);
            libc::dup2(socket, VMM_SOCKET_FD);
            libc::chroot(share_path.as_ptr());
            libc::chdir(c"/".as_ptr());
            let arguments = [c"bulkhead-vmm".as_ptr(), std::ptr::null()];
            libc::fexecve(program, arguments.as_ptr(), arguments[1..].as_ptr());
            Err(std::io::Error::last_os_error())
        });
    }
    let start = Instant::now();
    let mut child = command.spawn()?;
    drop(theirs);

    let (_agent, far_end) = UnixStream::pair()?;
    let mut descriptors: Vec<OwnedFd> = vec![
        File::options().read(true).write(true).open("/dev/kvm")?.into(),
        File::open(kernel)?.into(),
        File::open(root)?.into(),
        far_end.into(),
    ];
    let mut vsock_listeners = vec![(ports::AGENT, Fd(3))];
    for (port, stream) in streams {
        vsock_listeners.push((port, Fd(descriptors.len().try_into()?)));
        descriptors.push(stream.into());
    }
    std::fs::remove_dir(&share)?;
    let config = VmConfig {
        version: VERSION,
        vcpus,
        max_vcpus: vcpus,
        hotplug_mib: 0,
        memory_mib,
        kvm: Fd(0),
        start: Start::Kernel {
            kernel: Fd(1),
            command_line: rest.get(2..).unwrap_or_default().join(" "),
        },
        guest_cid: 3,
        root: Fd(2),
        console: true,
        disk_slots: 1,
        disks: vec![],
        net_slots: 0,
        nets: vec![],
        share: Some(bulkhead_protocol::control::Share {
            tag: "bulkhead".into(),
        }),
        vsock_listeners,
        balloon: true,
        seccomp: true,
    };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    ours.send(
        &RequestMessage {
            id: 1,
            request: Request::Boot(Box::new(config)),
        },
        &borrowed,
    )?;
    drop(descriptors);
    std::thread::spawn({
        let inspect = Channel::from(ours.as_fd().try_clone_to_owned()?);
        move || {
            std::thread::sleep(std::time::Duration::from_secs(10));
            let _ = inspect.send(
                &RequestMessage {
                    id: 2,
                    request: Request::Inspect,
                },
                &[],
            );
        }
    });
    while let Ok(received) = ours.receive::<VmmMessage>() {
        match received.message {
            VmmMessage::Event(Event::Exited(exit)) => println!("{}\n{}", exit.reason, exit.console),
            VmmMessage::Reply {
                id: 2,
                result: Ok(bulkhead_protocol::control::Reply::Inspected(state)),
            } => {
                println!("{}\n{:?}", state.console, state.devices);
                child.kill()?;
            }
            VmmMessage::Event(Event::VsockConnected { port: ports::AGENT }) => {
                println!("agent connected after {} us", start.elapsed().as_micros());
                if until_agent {
                    child.kill()?;
                }
            }
            other => println!("{other:?}"),
        }
    }
    println!("{}", child.wait()?);
    Ok(())
}
