use std::fs;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chroot, geteuid};

use super::*;

/// Set in a process that [`passed_in_own_process`] has started.
const OWN_PROCESS: &str = "BULKHEAD_JAIL_TEST";

/// Runs the test of this name in a process of its own, where the answer is `false`: the limits that are lowered are the
/// whole process's, and a test beside it that makes a larger file would be killed.
fn passed_in_own_process(name: &str) -> bool {
    if std::env::var_os(OWN_PROCESS).is_some() {
        return false;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("jail::tests::{name}"), "--test-threads=1"])
        .env(OWN_PROCESS, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    // A program that has no test of this name succeeds as well.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{}: {said}",
        output.status
    );
    true
}

/// Runs `inside` on a thread in the jail; the thread has capabilities of its own.
fn in_jail<T: Send + 'static>(inside: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        enter().unwrap();
        inside()
    });
    thread.join().unwrap()
}

/// Limits of capabilities are root's to lower. Without that power it must refuse, not pretend.
fn refused_without_root() -> bool {
    if geteuid().is_root() {
        return false;
    }
    assert!(matches!(enter(), Err(JailError::Capabilities(_))));
    true
}

#[test]
fn only_the_file_servers_capabilities_are_left() {
    if passed_in_own_process("only_the_file_servers_capabilities_are_left") || refused_without_root() {
        return;
    }
    let (mounts, root, status) = in_jail(|| {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        (unshare(CloneFlags::CLONE_NEWNS), chroot("/"), status)
    });
    assert_eq!((mounts, root), (Err(Errno::EPERM), Err(Errno::EPERM)));
    let kept = format!("{:016x}", KEPT);
    let none = "0000000000000000".to_owned();
    for (set, expected) in [
        ("CapInh", &none),
        ("CapPrm", &kept),
        ("CapEff", &kept),
        ("CapBnd", &kept),
        ("CapAmb", &none),
    ] {
        assert!(
            status.contains(&format!("{set}:\t{expected}\n")),
            "{set}: {status}"
        );
    }
}

#[test]
fn privileges_cannot_come_back() {
    if passed_in_own_process("privileges_cannot_come_back") || refused_without_root() {
        return;
    }
    let privileges = in_jail(|| {
        // SAFETY: prctl with these constants takes no pointers.
        unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) }
    });
    assert_eq!(privileges, 1);
}

#[test]
fn limits_are_lowered_for_good() {
    use nix::sys::resource::getrlimit;
    if passed_in_own_process("limits_are_lowered_for_good") || refused_without_root() {
        return;
    }
    let (limits, raised) = in_jail(|| {
        let limits = LIMITS.map(|(resource, _)| getrlimit(resource).unwrap());
        let raised = setrlimit(Resource::RLIMIT_FSIZE, FILE_SIZE, FILE_SIZE + 1);
        (limits, raised)
    });
    assert_eq!(limits, LIMITS.map(|(_, limit)| (limit, limit)));
    assert_eq!(raised, Err(Errno::EPERM));
}
