//! The guest's start: a root filesystem, namespaces, and the agent as their PID 1.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_agent::init;
use bulkhead_agent::service::uptime_us;
use bulkhead_agent::storage::mount::writable_disks;
use bulkhead_agent::streams::Host;
use bulkhead_protocol::ports;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

/// The agent's process, started before there is a runtime.
pub struct Started {
    pub(super) directory: PathBuf,
    pub(super) listener: std::os::unix::net::UnixListener,
    pub(super) agent: Pid,
}

/// Forks the agent into namespaces of its own.
pub fn start() -> Started {
    let directory = PathBuf::from(format!("/var/tmp/bulkhead-agent-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    make_rootfs(&directory.join("rootfs"));
    // Before the agent exists, which dials at once.
    let listener = std::os::unix::net::UnixListener::bind(directory.join(ports::AGENT.to_string())).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Started {
            directory,
            listener,
            agent: child,
        },
        ForkResult::Child => {
            unshare(
                CloneFlags::CLONE_NEWNS
                    | CloneFlags::CLONE_NEWPID
                    | CloneFlags::CLONE_NEWIPC
                    | CloneFlags::CLONE_NEWUTS
                    | CloneFlags::CLONE_NEWNET,
            )
            .unwrap();
            // SAFETY: as above. The child is PID 1 of the new namespace.
            match unsafe { fork() }.unwrap() {
                ForkResult::Parent { child } => {
                    // Stands for the guest: ends when it ends.
                    let _ = waitpid(child, None);
                    std::process::exit(0);
                }
                ForkResult::Child => run_agent(&directory),
            }
        }
    }
}

fn run_agent(directory: &Path) -> ! {
    // SAFETY: a plain prctl; the guest must not outlive the test.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .unwrap();
    // A freeze must not reach the machine's filesystems. The one at / is out of its reach as a guest's root image is.
    for point in writable_disks()
        .unwrap()
        .iter()
        .filter(|point| *point != Path::new("/"))
    {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    let rootfs = directory.join("rootfs");
    let result = bulkhead_agent::serve(Host::Unix(directory.to_owned()), uptime_us(), || {
        init::standard_descriptors()?;
        init::setup()?;
        let shared = Path::new("/run/bulkhead/shared");
        fs::create_dir_all(shared.join("rootfs")).unwrap();
        mount(
            Some(&rootfs),
            &shared.join("rootfs"),
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        Ok(())
    });
    if let Err(error) = &result {
        eprintln!("agent: {}", bulkhead_agent::error::chain(error));
    }
    std::process::exit(i32::from(result.is_err()));
}

/// A root filesystem of nothing but busybox.
fn make_rootfs(root: &Path) {
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("a static /bin/busybox");
    let applets = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
}
