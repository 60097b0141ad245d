use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use super::*;

/// Runs `inside` on a thread in the jail of a fresh directory; the thread has root, directory and
/// capabilities of its own, so that other tests keep theirs.
fn in_jail<T: Send + 'static>(name: &str, inside: impl FnOnce(File) -> T + Send + 'static) -> (PathBuf, T) {
    let outside = std::env::temp_dir().join(format!("bulkhead-jail-{name}-{}", std::process::id()));
    let root = outside.join("tree");
    fs::create_dir_all(&root).unwrap();
    let thread = std::thread::spawn({
        let root = root.clone();
        move || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            let root = File::open(root).unwrap();
            enter(Some(root.as_fd())).unwrap();
            inside(root)
        }
    });
    (outside, thread.join().unwrap())
}

/// The jail is made from root's powers. Without them it must refuse, not pretend.
fn refused_without_root() -> bool {
    if geteuid().is_root() {
        return false;
    }
    let root = File::open("/tmp").unwrap();
    assert!(matches!(
        enter(Some(root.as_fd())),
        Err(JailError::Namespaces(Errno::EPERM))
    ));
    true
}

#[test]
fn names_with_dots_stay_in_the_tree() {
    if refused_without_root() {
        return;
    }
    let (outside, result) = in_jail("names", |root| {
        let directory = root.as_raw_fd();
        let made = mkdirat(Some(directory), "../../../escaped", Mode::S_IRWXU);
        let removed = unlinkat(Some(directory), "../victim", UnlinkatFlags::NoRemoveDir);
        let absolute = open("/etc", OFlag::O_PATH, Mode::empty());
        (made, removed, absolute.map(drop))
    });
    assert_eq!(result, (Ok(()), Err(Errno::ENOENT), Err(Errno::ENOENT)));
    assert!(outside.join("tree/escaped").is_dir(), "the directory is inside");
    fs::remove_dir_all(outside).unwrap();
}

#[test]
fn only_the_file_servers_capabilities_are_left() {
    if refused_without_root() {
        return;
    }
    let (outside, result) = in_jail("capabilities", |_root| {
        let own_file = File::create("/file");
        (unshare(CloneFlags::CLONE_NEWNS), chroot("/"), own_file.is_ok())
    });
    assert_eq!(result, (Err(Errno::EPERM), Err(Errno::EPERM), true));
    fs::remove_dir_all(outside).unwrap();
}

#[test]
fn privileges_cannot_come_back() {
    if refused_without_root() {
        return;
    }
    let (outside, (privileges, bounding)) = in_jail("privileges", |_root| {
        // SAFETY: prctl with these constants takes no pointers.
        unsafe {
            (
                libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
                // CAP_SYS_ADMIN
                libc::prctl(libc::PR_CAPBSET_READ, 21, 0, 0, 0),
            )
        }
    });
    assert_eq!((privileges, bounding), (1, 0));
    fs::remove_dir_all(outside).unwrap();
}
