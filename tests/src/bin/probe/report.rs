//! What a process sees of itself and of the system around it.

use std::collections::BTreeMap;
use std::io;
use std::{env, fs};

use serde_json::{Value, json};

pub fn report() -> io::Result<Value> {
    let status = fs::read_to_string("/proc/self/status")?;
    let status: BTreeMap<_, _> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        .collect();
    let namespaces: BTreeMap<_, _> = fs::read_dir("/proc/self/ns")?
        .flatten()
        .map(|entry| (name(&entry), fs::read_link(entry.path()).unwrap_or_default()))
        .collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(json!({
        "status": status,
        "arguments": env::args().collect::<Vec<_>>(),
        "environment": env::vars().collect::<BTreeMap<_, _>>(),
        "cwd": env::current_dir()?,
        "hostname": text("/proc/sys/kernel/hostname"),
        "release": text("/proc/sys/kernel/osrelease"),
        "boot_id": text("/proc/sys/kernel/random/boot_id"),
        "limits": limits(),
        "namespaces": namespaces,
        "mounts": mounts.lines().filter_map(mount).collect::<Value>(),
        "processes": processes()?,
        "links": fs::read_dir("/sys/class/net")?.flatten().map(|entry| name(&entry)).collect::<Vec<_>>(),
        "devices": fs::read_dir("/dev")?.flatten().map(|entry| name(&entry)).collect::<Vec<_>>(),
        "cpus": std::thread::available_parallelism()?.get(),
        "oom_score_adj": text("/proc/self/oom_score_adj"),
    }))
}

fn name(entry: &fs::DirEntry) -> String {
    entry.file_name().to_string_lossy().into_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Soft and hard limits by their name in `/proc/self/limits`.
fn limits() -> BTreeMap<String, [String; 2]> {
    let table = text("/proc/self/limits");
    let row = |line: &str| {
        let (name, values) = line.split_at_checked(26)?;
        let mut values = values.split_whitespace().map(str::to_owned);
        Some((name.trim().to_owned(), [values.next()?, values.next()?]))
    };
    table.lines().skip(1).filter_map(row).collect()
}

fn mount(line: &str) -> Option<Value> {
    let (left, right) = line.split_once(" - ")?;
    let (left, right): (Vec<_>, Vec<_>) = (left.split(' ').collect(), right.split(' ').collect());
    Some(json!({
        "point": left.get(4)?,
        "options": left.get(5)?.split(',').collect::<Vec<_>>(),
        "type": right.first()?,
        "source": right.get(1)?,
        "super_options": right.get(2)?.split(',').collect::<Vec<_>>(),
    }))
}

fn processes() -> io::Result<BTreeMap<String, String>> {
    let entries = fs::read_dir("/proc")?.flatten().map(|entry| name(&entry));
    let processes = entries.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    Ok(processes
        .map(|pid| (pid.clone(), text(&format!("/proc/{pid}/comm"))))
        .collect())
}

/// Makes or finds a System V message queue, and answers with its id or the error's name.
pub fn queue(what: &str, key: i32) -> Result<String, String> {
    let flags = match what {
        "make" => libc::IPC_CREAT | 0o600,
        "find" => 0,
        _ => return Err(format!("unknown operation {what}")),
    };
    // SAFETY: takes integers only.
    let id = unsafe { libc::msgget(key, flags) };
    Ok(if id >= 0 {
        id.to_string()
    } else {
        format!("{:?}", nix::errno::Errno::last())
    })
}

/// Makes a device node and opens it.
fn device(path: &str, number: libc::dev_t) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    // The number of disks is that of virtio-blk, which is a block device; the others are character devices.
    let kind = if libc::major(number) == 1 {
        SFlag::S_IFCHR
    } else {
        SFlag::S_IFBLK
    };
    mknod(path, kind, Mode::from_bits_truncate(0o600), number)?;
    fs::File::open(path).map(drop)
}

/// Makes a system call that a container has no need of.
fn call(name: &str) -> Result<io::Result<()>, String> {
    let (number, arguments): (_, [libc::c_long; 3]) = match name {
        // The first keyring operation that does not exist.
        "keyctl" => (libc::SYS_keyctl, [9999, 0, 0]),
        "vsock" => (
            libc::SYS_socket,
            [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0],
        ),
        "user-namespace" => (libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]),
        "mount" => (libc::SYS_mount, [0, 0, 0]),
        "bpf" => (libc::SYS_bpf, [9999, 0, 0]),
        "userfaultfd" => (libc::SYS_userfaultfd, [0, 0, 0]),
        "raw-socket" => (
            libc::SYS_socket,
            [
                libc::AF_INET.into(),
                libc::SOCK_RAW.into(),
                libc::IPPROTO_ICMP.into(),
            ],
        ),
        "set-time" => (libc::SYS_settimeofday, [0, 0, 0]),
        _ => return Err(format!("unknown call {name}")),
    };
    // SAFETY: no argument is a pointer but null ones, and what a call may leave goes with this process.
    let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
    Ok(if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    })
}

/// Does one thing to a path and names the error: `ok`, `EPERM`, …
pub fn errno_of(what: &str, path: &str) -> Result<String, String> {
    let result = match what {
        "mkdir" => fs::create_dir(path),
        "read" => fs::read(path).map(drop),
        "list" => fs::read_dir(path).map(drop),
        "write" => fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .map(drop),
        "chown" => std::os::unix::fs::chown(path, Some(1), Some(1)),
        "null" => device(path, libc::makedev(1, 3)),
        "kmsg" => device(path, libc::makedev(1, 11)),
        "disk" => device(path, libc::makedev(254, 0)),
        // For calls of a known name with arguments that nothing is done with, in a place of their own.
        "call" => call(path)?,
        "sethostname" => nix::unistd::sethostname(path).map_err(io::Error::from),
        _ => return Err(format!("unknown operation {what}")),
    };
    Ok(match result {
        Ok(()) => "ok".into(),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("{:?}", nix::errno::Errno::from_raw(number)),
            None => error.to_string(),
        },
    })
}
