//! Exercises a file system, and leaves files whose every property the test checks from the host.

use std::ffi::CString;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Step = fn(&Path) -> Outcome;

macro_rules! ensure {
    ($condition:expr) => {
        if !$condition {
            return Err(format!("line {}: not so: {}", line!(), stringify!($condition)).into());
        }
    };
}

/// Runs each exercise below `directory`.
pub fn exercise(directory: &Path) -> Outcome {
    fs::create_dir_all(directory)?;
    let steps: [(&str, Step); 11] = [
        ("owners and permissions", owners_and_permissions),
        ("links", links),
        ("extended attributes", extended_attributes),
        ("special files", special_files),
        ("times", times),
        ("sizes", sizes),
        ("names", names),
        ("renames", renames),
        ("unlinked but open", unlinked_but_open),
        ("memory mapping", memory_mapping),
        ("another user", another_user),
    ];
    for (name, step) in steps {
        step(directory).map_err(|error| format!("{name}: {error}"))?;
    }
    println!("all done");
    Ok(())
}

fn owners_and_permissions(directory: &Path) -> Outcome {
    let plain = directory.join("plain");
    fs::write(&plain, "plain\n")?;
    chown(&plain, Some(1234), Some(2345))?;
    fs::set_permissions(&plain, Permissions::from_mode(0o640))?;
    let metadata = fs::metadata(&plain)?;
    ensure!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777) == (1234, 2345, 0o640));
    let setuid = directory.join("setuid");
    fs::write(&setuid, "")?;
    fs::set_permissions(&setuid, Permissions::from_mode(0o4755))?;
    ensure!(fs::metadata(&setuid)?.mode() & 0o7777 == 0o4755);
    // A write takes the set-user-id bit away from an unprivileged owner only; a change of owner always.
    chown(&setuid, Some(1234), None)?;
    ensure!(fs::metadata(&setuid)?.mode() & 0o7777 == 0o755);
    fs::set_permissions(&setuid, Permissions::from_mode(0o4755))?;
    let sticky = directory.join("sticky");
    fs::create_dir(&sticky)?;
    fs::set_permissions(&sticky, Permissions::from_mode(0o1777))?;
    let unreadable = directory.join("unreadable");
    fs::write(&unreadable, "secret")?;
    fs::set_permissions(&unreadable, Permissions::from_mode(0o000))?;
    ensure!(fs::read(&unreadable)? == b"secret");
    Ok(())
}

fn links(directory: &Path) -> Outcome {
    let (first, second) = (directory.join("link-a"), directory.join("link-b"));
    fs::write(&first, "one")?;
    fs::hard_link(&first, &second)?;
    OpenOptions::new()
        .append(true)
        .open(&second)?
        .write_all(b" two")?;
    let (a, b) = (fs::metadata(&first)?, fs::metadata(&second)?);
    ensure!(a.ino() == b.ino() && a.nlink() == 2);
    ensure!(fs::read(&first)? == b"one two");
    symlink("link-a", directory.join("relative"))?;
    symlink("/no/such/file", directory.join("dangling"))?;
    ensure!(fs::read(directory.join("relative"))? == b"one two");
    ensure!(fs::read_link(directory.join("dangling"))? == Path::new("/no/such/file"));
    ensure!(fs::read(directory.join("dangling")).is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
    Ok(())
}

fn extended_attributes(directory: &Path) -> Outcome {
    let file = directory.join("attributes");
    fs::write(&file, "")?;
    let large = vec![b'x'; 2000];
    set_attribute(&file, c"user.small", b"value")?;
    set_attribute(&file, c"user.large", &large)?;
    set_attribute(&file, c"user.removed", b"gone")?;
    let path = c_path(&file);
    // SAFETY: both are NUL-terminated strings that live through the call.
    ensure!(unsafe { libc::removexattr(path.as_ptr(), c"user.removed".as_ptr()) } == 0);
    ensure!(attribute(&file, c"user.small")? == b"value");
    ensure!(attribute(&file, c"user.large")? == large);
    ensure!(
        attribute(&file, c"user.removed").is_err_and(|error| error.raw_os_error() == Some(libc::ENODATA))
    );
    let mut names = vec![0_u8; 1024];
    // SAFETY: the buffer is valid for its length, the path is NUL-terminated.
    let size = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let listed =
        String::from_utf8_lossy(names.get(..usize::try_from(size)?).unwrap_or_default()).into_owned();
    ensure!(
        listed.contains("user.small\0") && listed.contains("user.large\0") && !listed.contains("removed")
    );
    // VFS_CAP_REVISION_2 with CAP_NET_BIND_SERVICE permitted and effective.
    let mut capability = [0_u8; 20];
    capability[..8].copy_from_slice(&[1, 0, 0, 2, 0, 4, 0, 0]);
    set_attribute(&file, c"security.capability", &capability)?;
    ensure!(attribute(&file, c"security.capability")? == capability);
    Ok(())
}

fn special_files(directory: &Path) -> Outcome {
    let fifo = directory.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    ensure!(fs::metadata(&fifo)?.file_type().is_fifo());
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || fs::read(fifo)
    });
    fs::write(&fifo, "through")?;
    ensure!(reader.join().map_err(|_| "the reader panicked")?? == b"through");
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket)?;
    let mut client = UnixStream::connect(&socket)?;
    client.write_all(b"hello")?;
    let mut got = [0; 5];
    listener.accept()?.0.read_exact(&mut got)?;
    ensure!(&got == b"hello");
    Ok(())
}

fn times(directory: &Path) -> Outcome {
    let path = directory.join("times");
    let file = File::create(&path)?;
    let at = |seconds, nanoseconds| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    file.set_times(
        FileTimes::new()
            .set_accessed(at(900_000_000, 1))
            .set_modified(at(1_000_000_000, 123_456_789)),
    )?;
    let metadata = fs::metadata(&path)?;
    ensure!((metadata.mtime(), metadata.mtime_nsec()) == (1_000_000_000, 123_456_789));
    ensure!((metadata.atime(), metadata.atime_nsec()) == (900_000_000, 1));
    Ok(())
}

fn sizes(directory: &Path) -> Outcome {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(directory.join("sparse"))?;
    file.write_all_at(b"end", 1 << 20)?;
    ensure!(file.metadata()?.len() == (1 << 20) + 3);
    let mut hole = [1; 16];
    file.read_exact_at(&mut hole, 4096)?;
    ensure!(hole == [0; 16]);
    file.set_len(10)?;
    file.seek(SeekFrom::End(0))?;
    file.write_all(b"tail")?;
    file.sync_all()?;
    ensure!(file.metadata()?.len() == 14);
    // SAFETY: the descriptor is open and the arguments are integers.
    ensure!(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 8192) } == 0);
    ensure!(file.metadata()?.len() == 8192);
    let exists = File::options()
        .write(true)
        .create_new(true)
        .open(directory.join("sparse"));
    ensure!(exists.is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists));
    ensure!(fs::write(directory.join("sparse/below"), "").is_err());
    Ok(())
}

fn names(directory: &Path) -> Outcome {
    fs::write(directory.join("n".repeat(255)), "")?;
    let long = fs::write(directory.join("n".repeat(256)), "");
    ensure!(long.is_err_and(|error| error.raw_os_error() == Some(libc::ENAMETOOLONG)));
    fs::write(directory.join("näme with ☃ and\nnewline"), "")?;
    let deep = directory.join(["d"; 40].join("/"));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("bottom"), "deep")?;
    Ok(())
}

fn renames(directory: &Path) -> Outcome {
    let (from, to) = (directory.join("rename-from"), directory.join("rename-to"));
    fs::write(&from, "new")?;
    fs::write(&to, "old")?;
    let mut old = File::open(&to)?;
    fs::rename(&from, &to)?;
    ensure!(fs::read(&to)? == b"new" && !from.exists());
    let mut text = String::new();
    old.read_to_string(&mut text)?;
    ensure!(text == "old");
    fs::create_dir(directory.join("moved"))?;
    fs::write(directory.join("moved/inside"), "in")?;
    fs::rename(directory.join("moved"), directory.join("moved-here"))?;
    ensure!(fs::read(directory.join("moved-here/inside"))? == b"in");
    let full = fs::remove_dir(directory.join("moved-here"));
    ensure!(full.is_err_and(|error| error.kind() == io::ErrorKind::DirectoryNotEmpty));
    Ok(())
}

fn unlinked_but_open(directory: &Path) -> Outcome {
    let path = directory.join("unlinked");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(b"still here")?;
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "still here" && file.metadata()?.nlink() == 0);
    Ok(())
}

fn memory_mapping(directory: &Path) -> Outcome {
    let path = directory.join("mapped");
    fs::write(&path, vec![b'.'; 8192])?;
    let file = File::options().read(true).write(true).open(&path)?;
    let (protection, descriptor) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: a new mapping of a file of that size; it is used within its bounds and unmapped below.
    unsafe {
        let memory = libc::mmap(
            std::ptr::null_mut(),
            8192,
            protection,
            libc::MAP_SHARED,
            descriptor,
            0,
        );
        ensure!(memory != libc::MAP_FAILED);
        memory.cast::<u8>().add(5000).write(b'!');
        ensure!(libc::msync(memory, 8192, libc::MS_SYNC) == 0);
        ensure!(libc::munmap(memory, 8192) == 0);
    }
    ensure!(fs::read(&path)?[4999..5002] == *b".!.");
    Ok(())
}

/// A process without root's power is refused what it should be, and owns what it makes.
fn another_user(directory: &Path) -> Outcome {
    fs::write(directory.join("root-only"), "")?;
    fs::set_permissions(directory.join("root-only"), Permissions::from_mode(0o600))?;
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    // SAFETY: this process has one thread by now, so the child may do anything.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain system calls with integers and a valid, empty list.
        let became = unsafe {
            libc::setgroups(0, std::ptr::null()) == 0 && libc::setgid(2345) == 0 && libc::setuid(1234) == 0
        };
        let denied = |result: io::Result<()>| {
            result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        };
        let as_expected = became
            && denied(fs::read(directory.join("root-only")).map(drop))
            && denied(fs::write(directory.join("new"), ""))
            && denied(fs::remove_file(directory.join("plain")))
            && fs::write(directory.join("sticky/mine"), "mine").is_ok();
        std::process::exit(if as_expected { 0 } else { 9 });
    }
    let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None)?;
    ensure!(ended == nix::sys::wait::WaitStatus::Exited(nix::unistd::Pid::from_raw(child), 0));
    let mine = fs::metadata(directory.join("sticky/mine"))?;
    ensure!((mine.uid(), mine.gid()) == (1234, 2345));
    Ok(())
}

/// Makes `count` files in a new directory, lists them, and removes every second one.
pub fn entries(directory: &Path, count: usize) -> Outcome {
    fs::create_dir(directory)?;
    for number in 0..count {
        File::create(directory.join(format!("entry-{number:06}")))?;
    }
    let mut names: Vec<_> = fs::read_dir(directory)?
        .map(|entry| entry.map(|e| e.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    names.dedup();
    ensure!(names.len() == count);
    for number in (1..count).step_by(2) {
        fs::remove_file(directory.join(format!("entry-{number:06}")))?;
    }
    let left = fs::read_dir(directory)?.count();
    println!("{} entries, {left} left", names.len());
    Ok(())
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

fn set_attribute(path: &Path, name: &std::ffi::CStr, value: &[u8]) -> io::Result<()> {
    let path = c_path(path);
    // SAFETY: the strings are NUL-terminated and the value is valid for its length.
    let result = unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn attribute(path: &Path, name: &std::ffi::CStr) -> io::Result<Vec<u8>> {
    let path = c_path(path);
    let mut value = vec![0_u8; 4096];
    // SAFETY: the strings are NUL-terminated and the buffer is valid for its length.
    let size = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(size).map_err(|_| io::Error::last_os_error())?);
    Ok(value)
}
