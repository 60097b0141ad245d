//! From inside: a program in the VMM's jail that does what a VMM which was taken over would try.
//!
//! The program is this one, started once for each attempt. It ends with the attempt's errno, or with 0 if it got through,
//! or is killed by its filter.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::control::VMM_PROC_FD;
use bulkhead_sandbox::jail::Jail;
use bulkhead_sandbox::spawn::{self, Ending, Program};
use bulkhead_tests::fixture::wait_until;
use bulkhead_vmm::jail::{self, Thread, landlock};
use libc::{c_int, c_long, syscall};

/// How the attempt's number, the kind of thread and the test's process and port reach the program.
const ATTEMPT: &str = "BULKHEAD_JAIL_ATTEMPT";
const THREAD: &str = "BULKHEAD_JAIL_THREAD";
const PARENT: &str = "BULKHEAD_JAIL_PARENT";
const PORT: &str = "BULKHEAD_JAIL_PORT";

/// A file of the host, open for reading.
const HOST_FILE: c_int = 5;

/// Name of an abstract socket of the host.
const ABSTRACT: &[u8] = b"bulkhead-jail-test";

struct Attempt {
    name: &'static str,
    run: fn() -> c_long,
    /// What it fails with where every system call is open. None: only the filter is in the way.
    walls: &'static [c_int],
    /// Whether it is made of calls that the file server needs, so that it fails in the same way there.
    files: bool,
}

const fn attempt(name: &'static str, walls: &'static [c_int], run: fn() -> c_long) -> Attempt {
    Attempt {
        name,
        run,
        walls,
        files: false,
    }
}

/// An attempt by calls of the file server.
const fn by_path(name: &'static str, walls: &'static [c_int], run: fn() -> c_long) -> Attempt {
    Attempt {
        name,
        run,
        walls,
        files: true,
    }
}

fn number(name: &str) -> i32 {
    std::env::var(name).unwrap().parse().unwrap()
}

fn open(path: &std::ffi::CStr) -> c_long {
    // SAFETY: the path is a C string.
    unsafe { syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY) }
}

/// A socket of `family` that connects to `address`.
fn connect(family: c_int, address: &[u8]) -> c_long {
    // SAFETY: the address lives during the call, and its length is given.
    unsafe {
        let socket = syscall(libc::SYS_socket, family, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return socket;
        }
        syscall(libc::SYS_connect, socket, address.as_ptr(), address.len())
    }
}

fn unix_address(path: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes(), path].concat()
}

const MISSING: &[c_int] = &[libc::ENOENT];
const REFUSED: &[c_int] = &[libc::EPERM];
const NO_PROCESS: &[c_int] = &[libc::ESRCH];
const FILTER_ONLY: &[c_int] = &[];

// SAFETY: (all closures below) plain system calls; pointers are null or to static C strings.
const ATTEMPTS: &[Attempt] = &[
    by_path("open /proc", MISSING, || open(c"/proc/self/status")),
    by_path("open /etc/shadow", MISSING, || open(c"/etc/shadow")),
    by_path("open /dev/kvm", MISSING, || open(c"/dev/kvm")),
    by_path("open a path out of the root", MISSING, || {
        open(c"/../../../../etc/shadow")
    }),
    by_path("make a device", REFUSED, || {
        let kvm = libc::makedev(10, 232);
        // SAFETY: the path is a C string.
        unsafe {
            syscall(
                libc::SYS_mknodat,
                libc::AT_FDCWD,
                c"/kvm".as_ptr(),
                libc::S_IFCHR | 0o666,
                kvm,
            )
        }
    }),
    by_path("open a file by its handle's mount", REFUSED, || {
        // struct file_handle with a handle of 8 bytes.
        let handle = [8u32, 1, 0, 0];
        // SAFETY: the handle lives during the call.
        unsafe {
            syscall(
                libc::SYS_open_by_handle_at,
                HOST_FILE,
                handle.as_ptr(),
                libc::O_RDONLY,
            )
        }
    })
    .by_filter(),
    by_path("leave by the descriptors' directory", MISSING, || {
        // SAFETY: the path is a C string.
        unsafe {
            syscall(
                libc::SYS_openat,
                VMM_PROC_FD,
                c"../../sys/kernel/core_pattern".as_ptr(),
                libc::O_RDONLY,
            )
        }
    }),
    by_path("write to a host file open for reading", &[libc::EACCES], || {
        // SAFETY: the path is a C string.
        unsafe { syscall(libc::SYS_openat, VMM_PROC_FD, c"5".as_ptr(), libc::O_WRONLY) }
    }),
    attempt("connect to containerd", MISSING, || {
        connect(libc::AF_UNIX, &unix_address(b"/run/containerd/containerd.sock\0"))
    }),
    attempt(
        "connect to an abstract socket",
        &[libc::ECONNREFUSED, libc::EPERM],
        || connect(libc::AF_UNIX, &unix_address(&[b"\0", ABSTRACT].concat())),
    ),
    attempt("connect to loopback", &[libc::ENETUNREACH, libc::EACCES], || {
        let port = (number(PORT) as u16).to_be_bytes();
        let address = [
            &(libc::AF_INET as u16).to_ne_bytes(),
            &port,
            &[127, 0, 0, 1][..],
            &[0; 8],
        ]
        .concat();
        connect(libc::AF_INET, &address)
    }),
    attempt("trace the parent", NO_PROCESS, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, number(PARENT), 0, 0) }
    }),
    attempt("signal the parent", NO_PROCESS, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_kill, number(PARENT), 0) }
    }),
    attempt("write to the parent's memory", NO_PROCESS, || {
        let byte = 0u8;
        let vector = libc::iovec {
            iov_base: (&raw const byte).cast_mut().cast(),
            iov_len: 1,
        };
        let vector = &raw const vector;
        // SAFETY: the vector lives during the call; what it names is read only, and nothing is at that place there.
        unsafe {
            syscall(
                libc::SYS_process_vm_writev,
                number(PARENT),
                vector,
                1,
                vector,
                1,
                0u64,
            )
        }
    }),
    attempt("mount", REFUSED, || {
        let kind = c"tmpfs".as_ptr();
        // SAFETY: C strings, and null for data.
        unsafe { syscall(libc::SYS_mount, kind, c"/".as_ptr(), kind, 0, 0) }
    }),
    attempt("change the root directory", REFUSED, || {
        // SAFETY: the path is a C string.
        unsafe { syscall(libc::SYS_chroot, c"/".as_ptr()) }
    }),
    attempt("unshare mounts", REFUSED, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_unshare, libc::CLONE_NEWNS) }
    }),
    attempt("unshare users", FILTER_ONLY, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_unshare, libc::CLONE_NEWUSER) }
    }),
    attempt("enter another namespace", &[libc::EINVAL], || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_setns, HOST_FILE, 0) }
    }),
    attempt("set the host name", REFUSED, || {
        // SAFETY: one byte of a static string.
        unsafe { syscall(libc::SYS_sethostname, c"x".as_ptr(), 1) }
    }),
    attempt("use keys", FILTER_ONLY, || {
        // KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING.
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_keyctl, 0, -3, 1) }
    }),
    attempt("use BPF", FILTER_ONLY, || {
        // SAFETY: an attribute of length 0 is not read.
        unsafe { syscall(libc::SYS_bpf, 0, 0, 0) }
    }),
    attempt("count events", FILTER_ONLY, || {
        // SAFETY: a null pointer is refused.
        unsafe { syscall(libc::SYS_perf_event_open, 0, 0, -1, -1, 0) }
    }),
    attempt("make an io_uring", FILTER_ONLY, || {
        // SAFETY: a null pointer is refused.
        unsafe { syscall(libc::SYS_io_uring_setup, 1, 0) }
    }),
    attempt("handle page faults", FILTER_ONLY, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_userfaultfd, 0) }
    }),
    attempt("fork", FILTER_ONLY, || {
        // SAFETY: as fork(2).
        unsafe { syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }
    }),
    attempt("execute a path", MISSING, || {
        // SAFETY: the path is a C string; null lists are empty.
        unsafe { syscall(libc::SYS_execve, c"/bin/sh".as_ptr(), 0, 0) }
    }),
    attempt("execute a descriptor", &[libc::EACCES], || {
        // SAFETY: the path is a C string; null lists are empty.
        unsafe {
            syscall(
                libc::SYS_execveat,
                HOST_FILE,
                c"".as_ptr(),
                0,
                0,
                libc::AT_EMPTY_PATH,
            )
        }
    }),
    // ENOSYS: a kernel without modules.
    attempt("load a module", &[libc::EPERM, libc::ENOSYS], || {
        // SAFETY: the string is empty.
        unsafe { syscall(libc::SYS_finit_module, HOST_FILE, c"".as_ptr(), 0) }
    }),
    attempt("make a netlink socket", FILTER_ONLY, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0) }
    }),
    attempt("make a vsock socket", FILTER_ONLY, || {
        // SAFETY: no memory is passed.
        unsafe { syscall(libc::SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0) }
    }),
    attempt("map code", FILTER_ONLY, || {
        let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place the kernel chooses.
        unsafe { syscall(libc::SYS_mmap, 0, 4096, access, kind, -1, 0) }
    }),
    attempt("take a terminal's input", &[libc::ENOTTY], || {
        // SAFETY: one byte of a static string.
        unsafe { syscall(libc::SYS_ioctl, HOST_FILE, libc::TIOCSTI, c"x".as_ptr()) }
    }),
];

impl Attempt {
    /// It is not by a call of the file server after all.
    const fn by_filter(self) -> Self {
        Self { files: false, ..self }
    }
}

/// A directory of the test's own, with a file and a file system in it, until it is dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let place = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
        fs::create_dir_all(place.join("tree")).unwrap();
        fs::write(place.join("file"), "host").unwrap();
        let place = Self(place);
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tree"), &place.tree(), Some("tmpfs"), flags, none).unwrap();
        place
    }

    /// The file system.
    fn tree(&self) -> PathBuf {
        self.0.join("tree")
    }

    /// The file, open for reading.
    fn file(&self) -> File {
        File::open(self.0.join("file")).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.tree(), nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Has a program in the jail make attempt `index` as a thread of kind `thread`; how it ended.
fn run(root: Option<&Path>, index: usize, thread: &str, port: u16, host_file: &File) -> Ending {
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let strings = |strings: &[String]| -> Vec<CString> {
        strings
            .iter()
            .map(|text| CString::new(text.as_str()).unwrap())
            .collect()
    };
    let arguments = [
        "jail",
        "--exact",
        "jail::inside::attempt_in_the_jail",
        "--ignored",
        "--test-threads=1",
    ];
    let process = spawn::spawn(&Program {
        executable: program.as_fd(),
        arguments: strings(&arguments.map(str::to_owned)),
        environment: strings(&[
            format!("{ATTEMPT}={index}"),
            format!("{THREAD}={thread}"),
            format!("{PARENT}={}", std::process::id()),
            format!("{PORT}={port}"),
        ]),
        descriptors: vec![
            (null.as_fd(), 0),
            (null.as_fd(), 1),
            (null.as_fd(), 2),
            (null.as_fd(), 3),
            (host_file.as_fd(), HOST_FILE),
        ],
        jail: Some(Jail {
            root,
            user_namespace: true,
        }),
    })
    .unwrap();
    let mut ending = None;
    let ended = wait_until(Duration::from_secs(60), || {
        ending = spawn::reap(process.pidfd.as_fd()).unwrap();
        ending.is_some()
    });
    if !ended {
        let _ = spawn::pidfd_kill(&process.pidfd);
        std::thread::sleep(Duration::from_millis(100));
        let _ = spawn::reap(process.pidfd.as_fd());
    }
    ending.unwrap_or_else(|| panic!("attempt {index} does not end"))
}

#[test]
fn every_way_out_is_refused() {
    let place = Place::new("jail-inside");
    let (tree, host_file) = (place.tree(), place.file());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(ABSTRACT).unwrap()).unwrap();
    let mut wrong = Vec::new();
    println!("Landlock version {}", landlock::version());
    for (index, attempt) in ATTEMPTS.iter().enumerate() {
        for thread in ["none", "vcpu", "main", "files"] {
            if thread == "none" && attempt.walls.is_empty() {
                continue;
            }
            let ending = run(Some(&tree), index, thread, port, &host_file);
            let by_walls = thread == "none" || thread == "files" && attempt.files;
            let right = match ending {
                Ending::Exited(errno) if by_walls => attempt.walls.contains(&errno),
                Ending::Killed(signal) if !by_walls => signal == libc::SIGSYS,
                _ => false,
            };
            if !right {
                wrong.push(format!("{} as {thread}: {ending:?}", attempt.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn without_a_tree_the_root_is_empty_and_read_only() {
    let place = Place::new("jail-empty");
    let ending = run(None, ATTEMPTS.len(), "none", 0, &place.file());
    assert_eq!(ending, Ending::Exited(libc::EROFS));
}

/// What happens in the jail.
#[test]
#[ignore = "runs in a process that the tests above start"]
fn attempt_in_the_jail() {
    jail::enter().unwrap();
    match std::env::var(THREAD).unwrap().as_str() {
        "vcpu" => jail::confine(Thread::Vcpu).unwrap(),
        "main" => jail::confine(Thread::Main).unwrap(),
        "files" => jail::confine(Thread::Files).unwrap(),
        _ => {}
    }
    let result = match ATTEMPTS.get(number(ATTEMPT) as usize) {
        Some(attempt) => (attempt.run)(),
        None => {
            // The root: nothing in it, and nothing can be put there.
            assert_eq!(fs::read_dir("/").unwrap().count(), 0);
            match File::create("/file").and_then(|mut file| file.write_all(b"x")) {
                Ok(()) => 0,
                Err(_) => -1,
            }
        }
    };
    let code = if result < 0 {
        nix::errno::Errno::last_raw()
    } else {
        0
    };
    // SAFETY: ends the process; what the harness would still do may need more system calls.
    unsafe { libc::_exit(code) }
}
