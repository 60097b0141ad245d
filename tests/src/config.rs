//! Where the suite finds what it needs, from the environment.

use std::env;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

const HOW_TO_RUN: &str = "these tests need root, KVM, containerd and a busybox image; \
    `cargo xtask test` (or `make test`) provides them, in an emulated host where the machine has no KVM";

/// What the environment says.
#[derive(Debug)]
pub struct Config {
    /// The containerd binary.
    pub containerd: PathBuf,
    /// The `ctr` binary of the same version.
    pub ctr: PathBuf,
    /// OCI layout tar of a busybox image.
    pub image: PathBuf,
    /// Runtime under test, as `ctr run --runtime` takes it.
    pub runtime: String,
    /// Runtime handler under test of the suite that drives CRI: `kata`, or `kata-shim` for containerd's
    /// `sandboxer = "shim"`.
    pub handler: String,
    /// Directory of the CNI plugins.
    pub cni: PathBuf,
    /// Factor on every deadline: 1 on hardware, more where the host is emulated.
    pub time_scale: u32,
    /// Divisor of how many pods or processes the tests of many at once start: 1, unless another run has shown it.
    pub crowd_divisor: u32,
    /// How many cycles a test of many makes.
    pub cycles: u32,
    /// Of the faults that can be had, one in so many is.
    pub fault_divisor: u32,
    /// Directory that receives containerd's log when the process ends.
    pub log_dir: Option<PathBuf>,
    /// What containerd and the shims log: `debug`, unless time is measured.
    pub log_level: String,
}

impl Config {
    fn from_env() -> Result<Self, String> {
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } != 0 {
            return Err("not running as root".into());
        }
        let image = env::var_os("BULKHEAD_TEST_IMAGE").ok_or("BULKHEAD_TEST_IMAGE is not set")?;
        let image = PathBuf::from(image);
        if !image.is_file() {
            return Err(format!("BULKHEAD_TEST_IMAGE={} is not a file", image.display()));
        }
        let directory = env::var_os("BULKHEAD_TEST_CONTAINERD_DIR").map(PathBuf::from);
        let number = |name: &str, default: u32| match env::var(name) {
            Ok(text) => text
                .parse::<NonZeroU32>()
                .map(NonZeroU32::get)
                .map_err(|_| format!("{name}={text} is not a number above 0")),
            Err(_) => Ok(default),
        };
        let time_scale = number("BULKHEAD_TEST_TIME_SCALE", 1)?;
        let crowd_divisor = number("BULKHEAD_TEST_CROWD_DIVISOR", 1)?;
        let config = Config {
            containerd: find("containerd", directory.as_deref())?,
            ctr: find("ctr", directory.as_deref())?,
            image,
            runtime: env::var("BULKHEAD_TEST_RUNTIME").unwrap_or_else(|_| "io.containerd.kata.v2".into()),
            handler: env::var("BULKHEAD_TEST_HANDLER").unwrap_or_else(|_| "kata".into()),
            cni: env::var_os("BULKHEAD_TEST_CNI_DIR").map_or_else(|| "/usr/lib/cni".into(), PathBuf::from),
            time_scale,
            crowd_divisor,
            cycles: number("BULKHEAD_TEST_CYCLES", 10)?,
            fault_divisor: number("BULKHEAD_TEST_FAULT_DIVISOR", 1)?,
            log_dir: env::var_os("BULKHEAD_TEST_LOG_DIR").map(PathBuf::from),
            log_level: env::var("BULKHEAD_TEST_LOG_LEVEL").unwrap_or_else(|_| "debug".into()),
        };
        if config.is_vm() {
            find("containerd-shim-kata-v2", None)?;
            if !Path::new("/dev/kvm").exists() {
                return Err("/dev/kvm does not exist".into());
            }
        }
        Ok(config)
    }

    /// How many of `number` to start at once or to make, at least one.
    #[must_use]
    pub fn crowd(&self, number: u32) -> u32 {
        (number / self.crowd_divisor).max(1)
    }

    /// Whether the runtime under test is ours. Another one (runc) serves to develop the harness.
    #[must_use]
    pub fn is_vm(&self) -> bool {
        self.runtime.contains("kata")
    }

    /// A deadline of `seconds` on hardware.
    #[must_use]
    pub fn seconds(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds * self.time_scale))
    }
}

pub(crate) fn find(name: &str, directory: Option<&Path>) -> Result<PathBuf, String> {
    let in_path = env::var_os("PATH").unwrap_or_default();
    let directories = match directory {
        Some(directory) => vec![directory.to_path_buf()],
        None => env::split_paths(&in_path).collect(),
    };
    directories
        .iter()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| format!("{name} is not in {directories:?}"))
}

/// The configuration of this process.
///
/// # Panics
/// When something is missing, with a message that says what and how to run the suite.
pub fn config() -> &'static Config {
    static CONFIG: OnceLock<Result<Config, String>> = OnceLock::new();
    match CONFIG.get_or_init(Config::from_env) {
        Ok(config) => config,
        Err(missing) => panic!("{missing}: {HOW_TO_RUN}"),
    }
}
