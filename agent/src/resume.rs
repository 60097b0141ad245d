//! A guest that goes on from a snapshot, and what it must not share with the others that do.
//!
//! `docs/templates.md` lists what the kernel and the agent keep in memory and what becomes of it.

pub mod boot_id;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::container::spec::valid_id;
use crate::sandbox::FILES;

/// Least bytes of entropy: what the kernel's generator needs to be seeded (`POOL_READY_BITS`, 256 bits).
const MIN_ENTROPY: usize = 32;

/// Most bytes of entropy: far more than the generator holds.
const MAX_ENTROPY: usize = 4096;

/// The kernel's limit of a host name, in bytes.
const MAX_HOSTNAME: usize = 64;

/// Name of the machine id among the pod's files.
const MACHINE_ID: &str = "machine-id";

/// What two drivers of random numbers can hold of the host's: one buffer each, 64 bytes.
const HELD_BACK: usize = 128;

/// Why a resume was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// Too little or too much entropy.
    #[error("{0} bytes of entropy are not {MIN_ENTROPY} to {MAX_ENTROPY}")]
    Entropy(usize),
    /// Not a machine id.
    #[error("{0:?} is not a machine id of 32 hexadecimal digits")]
    MachineId(String),
    /// Not a host name.
    #[error("{0:?} is not a host name")]
    HostnameValue(String),
    /// The name of a file for containers.
    #[error("{0:?} is not a file's name")]
    FileName(String),
    /// The kernel's generator.
    #[error("cannot reseed the kernel's generator")]
    Random(#[source] io::Error),
    /// The clock.
    #[error("cannot set the clock")]
    Clock(#[source] Errno),
    /// The host name.
    #[error("cannot set the host name to {0:?}")]
    Hostname(String, #[source] Errno),
    /// A file for containers.
    #[error("cannot write {}", .0.display())]
    File(PathBuf, #[source] io::Error),
}

impl ResumeError {
    /// Whether the host's request is to blame.
    pub fn is_argument(&self) -> bool {
        matches!(
            self,
            Self::Entropy(_) | Self::MachineId(_) | Self::HostnameValue(_) | Self::FileName(_)
        )
    }
}

/// A request that makes sense.
#[derive(Debug)]
pub struct Resume<'a> {
    request: &'a proto::ResumeRequest,
}

/// What a resumed guest calls itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// 32 hexadecimal digits.
    pub id: String,
}

impl<'a> Resume<'a> {
    /// Checks a request, all of it before anything is changed.
    ///
    /// # Errors
    /// A field that makes no sense.
    pub fn new(request: &'a proto::ResumeRequest) -> Result<Self, ResumeError> {
        let entropy = request.entropy.len();
        if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy) {
            return Err(ResumeError::Entropy(entropy));
        }
        let id = &request.machine_id;
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if !id.is_empty() && (id.len() != 32 || !id.bytes().all(digit)) {
            return Err(ResumeError::MachineId(id.clone()));
        }
        let name = &request.hostname;
        if name.len() > MAX_HOSTNAME || name.contains(['\0', '/', '\n']) {
            return Err(ResumeError::HostnameValue(name.clone()));
        }
        if let Some(name) = request.files.keys().find(|name| !valid_id(name)) {
            return Err(ResumeError::FileName(name.clone()));
        }
        Ok(Self { request })
    }

    /// Carries it out: the generator first, because all the rest may draw from it.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<Session, ResumeError> {
        reseed(&self.request.entropy).map_err(ResumeError::Random)?;
        RESUMED.store(true, Ordering::Relaxed);
        if self.request.realtime_ns != 0 {
            let now = TimeSpec::from_duration(Duration::from_nanos(self.request.realtime_ns));
            clock_settime(ClockId::CLOCK_REALTIME, now).map_err(ResumeError::Clock)?;
        }
        let name = &self.request.hostname;
        if !name.is_empty() {
            nix::unistd::sethostname(name).map_err(|errno| ResumeError::Hostname(name.clone(), errno))?;
        }
        self.write_files(Path::new(FILES))?;
        if self.request.fork {
            let path = Path::new(BOOT_ID);
            let id = uuid(random().map_err(ResumeError::Random)?);
            write_read_only(path, format!("{id}\n").as_bytes())
                .map_err(|error| ResumeError::File(path.to_owned(), error))?;
        }
        let id = hex(&random().map_err(ResumeError::Random)?);
        Ok(Session { id })
    }

    /// In place, not by a rename: running containers have mounted the files themselves.
    fn write_files(&self, directory: &Path) -> Result<(), ResumeError> {
        let mut files: HashMap<&str, &[u8]> = HashMap::new();
        for (name, content) in &self.request.files {
            files.insert(name, content);
        }
        let machine_id = format!("{}\n", self.request.machine_id);
        if !self.request.machine_id.is_empty() {
            files.insert(MACHINE_ID, machine_id.as_bytes());
        }
        if files.is_empty() {
            return Ok(());
        }
        let fail = |path: &Path| {
            let path = path.to_owned();
            |error| ResumeError::File(path, error)
        };
        fs::create_dir_all(directory).map_err(fail(directory))?;
        for (name, content) in files {
            let path = directory.join(name);
            fs::write(&path, content)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
                .map_err(fail(&path))?;
        }
        Ok(())
    }
}

/// Boot id that containers of a fork see in place of the kernel's.
pub const BOOT_ID: &str = "/run/bulkhead/boot-id";

fn write_read_only(path: &Path, content: &[u8]) -> io::Result<()> {
    // The file of an earlier resume stays as it is for the containers that have mounted it.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => (),
    }
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o444))
}

/// `struct rand_pool_info` of random(4).
#[repr(C)]
struct PoolInfo {
    bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; MAX_ENTROPY],
}

nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), PoolInfo);
nix::ioctl_none!(reseed_generator, b'R', 0x07);

/// Mixes entropy into the kernel's pool, credits all of it, and makes the generators of all processors start over from
/// the pool: what getrandom(2) and `/dev/urandom` give from now on depends on it.
fn reseed(entropy: &[u8]) -> io::Result<()> {
    let mut pool = PoolInfo {
        bits: 0,
        bytes: 0,
        buffer: [0; MAX_ENTROPY],
    };
    let length = entropy.len().min(MAX_ENTROPY);
    for (to, from) in pool.buffer.iter_mut().zip(entropy) {
        *to = *from;
    }
    pool.bytes = i32::try_from(length).unwrap_or(0);
    pool.bits = pool.bytes * 8;
    let device = File::open("/dev/urandom")?;
    // SAFETY: the structure is valid for reads and holds as many bytes as it says.
    unsafe { add_entropy(device.as_raw_fd(), &pool) }?;
    // SAFETY: has no argument.
    unsafe { reseed_generator(device.as_raw_fd()) }?;
    Ok(())
}

/// Whether this guest goes on from a snapshot.
static RESUMED: AtomicBool = AtomicBool::new(false);

/// Reads away what the driver of the virtual generator had fetched from the host before a snapshot, if there was one: a
/// container with access to `/dev/hwrng` would read the same bytes in every clone. Can block: for helper processes.
pub fn discard_held_back() {
    if !RESUMED.load(Ordering::Relaxed) {
        return;
    }
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/hwrng");
    if let Ok(mut device) = device {
        // A guest without the device, or with nothing held back, has nothing to lose.
        let _ = device.read(&mut [0; HELD_BACK]);
    }
}

/// 16 bytes out of the kernel's generator.
fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is valid for writes of its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) == Ok(bytes.len()) {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A random UUID (RFC 9562, section 5.4), as the kernel writes its boot id.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hex(&bytes);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
    parts.join("-")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request() -> proto::ResumeRequest {
        proto::ResumeRequest {
            version: proto::VERSION,
            entropy: vec![7; 32],
            ..Default::default()
        }
    }

    #[test]
    fn requests_are_checked_whole() {
        assert!(Resume::new(&request()).is_ok());
        for length in [0, 31, 4097] {
            let mut short = request();
            short.entropy = vec![1; length];
            assert!(matches!(Resume::new(&short), Err(ResumeError::Entropy(l)) if l == length));
        }
        for id in [
            "0",
            "0123456789ABCDEF0123456789ABCDEF",
            &"g".repeat(32),
            &"0".repeat(33),
        ] {
            let mut wrong = request();
            wrong.machine_id = id.into();
            assert!(
                matches!(Resume::new(&wrong), Err(ResumeError::MachineId(_))),
                "{id}"
            );
        }
        for name in ["a/b", "a\0", &"x".repeat(65)] {
            let mut wrong = request();
            wrong.hostname = name.into();
            assert!(
                matches!(Resume::new(&wrong), Err(ResumeError::HostnameValue(_))),
                "{name}"
            );
        }
        let mut wrong = request();
        wrong.files.insert("../x".into(), Vec::new());
        let error = Resume::new(&wrong).unwrap_err();
        assert!(matches!(error, ResumeError::FileName(_)) && error.is_argument());
    }

    #[test]
    fn files_are_written_in_place() {
        let directory = std::env::temp_dir().join(format!("bulkhead-resume-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("hosts"), "a much longer text than the new one").unwrap();
        let kept = File::open(directory.join("hosts")).unwrap();
        let mut request = request();
        request.files.insert("hosts".into(), b"new".to_vec());
        request.machine_id = "0123456789abcdef".repeat(2);
        Resume::new(&request).unwrap().write_files(&directory).unwrap();
        assert_eq!(io::read_to_string(kept).unwrap(), "new");
        let id = fs::read_to_string(directory.join("machine-id")).unwrap();
        assert_eq!(id, format!("{}\n", request.machine_id));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn uuids_say_that_they_are_random() {
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_ne!(random().unwrap(), random().unwrap());
    }
}
