//! Configuration of the runtime: one JSON file, every key optional.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// Configuration file read when the caller names none.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.json";

/// Prefix of the Kata annotations that change the configuration of one sandbox.
pub const ANNOTATION_PREFIX: &str = "io.katacontainers.config.";

const HYPERVISOR_PREFIX: &str = "io.katacontainers.config.hypervisor.";

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 32;

/// Least guest memory in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;

/// Most guest memory in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// Longest addition to the kernel command line in bytes.
pub const MAX_KERNEL_PARAMETERS: usize = 1024;

/// Most empty disk slots.
pub const MAX_DISK_SLOTS: u32 = 12;

/// Most network interfaces that can be added.
pub const MAX_NET_SLOTS: u32 = 12;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read the configuration file {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// The file is not JSON, or has an unknown key or a value of the wrong type.
    #[error("Configuration file {} is not valid", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    /// A value is out of range.
    #[error("{field} = {value} is not valid: {reason}")]
    Value {
        /// Key of the file, or name of the annotation.
        field: String,
        /// The refused value.
        value: String,
        /// What is allowed.
        reason: String,
    },
    /// An annotation has no meaning here, or the configuration does not enable it.
    #[error("Annotation {name} is refused: {reason}")]
    Annotation {
        /// Full name of the annotation.
        name: String,
        /// Why.
        reason: &'static str,
    },
}

/// Everything that can be configured. Unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Configuration {
    /// Guest kernel, an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Root image of the guest, EROFS.
    pub image: PathBuf,
    /// The `bulkhead-vmm` program; absent: beside the running program, else in `/usr/local/libexec/bulkhead`.
    pub vmm: Option<PathBuf>,
    /// vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, 64 and up.
    pub memory_mib: u32,
    /// Most vCPUs, `vcpus` to 32; absent: as many as the host has processors, but not more than 8.
    pub max_vcpus: Option<u8>,
    /// Most guest memory in MiB, `memory_mib` and up; absent: as much as the host has.
    pub max_memory_mib: Option<u32>,
    /// Guest memory in MiB beside the containers' limits, for kernel and agent, 32 to 1024.
    pub overhead_memory_mib: u32,
    /// Appended to the guest's kernel command line.
    pub kernel_parameters: String,
    /// Whether the guest has a serial console, of which errors show the last lines.
    pub console: bool,
    /// Whether the guest gives free memory back (balloon with free page reporting).
    pub balloon: bool,
    /// Disks that can be attached to a running VM, 0 to 16.
    pub disk_slots: u32,
    /// Network interfaces that can be added to a running VM, 0 to 12, as far as disks and the interfaces it starts
    /// with leave places on its bus.
    pub net_slots: u32,
    /// Whether the host's kernel carries the guest's frames (vhost-net), where it can; else the VMM does.
    pub vhost_net: bool,
    /// Deadline in seconds for each phase of a boot, 1 to 600.
    pub boot_timeout_s: u32,
    /// Deadline in seconds for one request to the agent, 1 to 600.
    pub request_timeout_s: u32,
    /// Directory of the sandboxes' state; on a file system that does not outlive a reboot.
    pub state_dir: PathBuf,
    /// Whether VMs begin from templates, and who shares one.
    pub templates: Templates,
    /// Directory of the templates.
    pub template_dir: PathBuf,
    /// Directory of the snapshots that pods may begin from, each in a directory of its own.
    pub snapshot_dir: PathBuf,
    /// Where a sandbox leaves the timeline of its start as `<sandbox id>.json`; absent: nowhere.
    pub timeline_dir: Option<PathBuf>,
    /// Kata annotations (without `io.katacontainers.config.hypervisor.`) that a sandbox may set.
    pub enable_annotations: Vec<String>,
    /// Walls of the VMM's jail to do without, on a host that does not have them.
    pub weaker_jail: Vec<Wall>,
    /// Whether debug messages are logged whatever the caller's log level.
    pub debug: bool,
}

/// Who shares a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Templates {
    /// All pods of a shape.
    Shared,
    /// The pods of a shape in one Kubernetes namespace, or else in one containerd namespace.
    Namespace,
    /// Nobody: every VM boots.
    Off,
}

/// A wall of the VMM's jail that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wall {
    /// Without it the VMM has the file server's capabilities on the host.
    UserNamespace,
    /// Without it every system call is open to the VMM.
    Seccomp,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/share/bulkhead/vmlinux".into(),
            image: "/usr/local/share/bulkhead/root.erofs".into(),
            vmm: None,
            vcpus: 1,
            memory_mib: 256,
            max_vcpus: None,
            max_memory_mib: None,
            overhead_memory_mib: 64,
            kernel_parameters: String::new(),
            console: true,
            balloon: true,
            disk_slots: 2,
            net_slots: 2,
            vhost_net: true,
            boot_timeout_s: 60,
            request_timeout_s: 60,
            state_dir: "/run/bulkhead".into(),
            templates: Templates::Shared,
            template_dir: "/var/lib/bulkhead/templates".into(),
            snapshot_dir: "/var/lib/bulkhead/snapshots".into(),
            timeline_dir: None,
            enable_annotations: ["default_vcpus", "default_memory", "kernel_params"]
                .map(String::from)
                .into(),
            weaker_jail: Vec::new(),
            debug: false,
        }
    }
}

impl Configuration {
    /// Reads `path`, or [`DEFAULT_PATH`] if it exists, or takes the defaults; checks every value.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file, or the field and its value.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (file, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let configuration: Self = match std::fs::read(file) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| ConfigError::Parse(file.into(), error))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => Self::default(),
            Err(error) => return Err(ConfigError::Read(file.into(), error)),
        };
        configuration.validate()?;
        Ok(configuration)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check("vcpus", self.vcpus, 1, MAX_VCPUS)?;
        check("memory_mib", self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
        if let Some(most) = self.max_vcpus {
            check("max_vcpus", most, self.vcpus, MAX_VCPUS)?;
        }
        if let Some(most) = self.max_memory_mib {
            check("max_memory_mib", most, self.memory_mib, MAX_MEMORY_MIB)?;
        }
        check("overhead_memory_mib", self.overhead_memory_mib, 32, 1024)?;
        check("disk_slots", self.disk_slots, 0, MAX_DISK_SLOTS)?;
        check("net_slots", self.net_slots, 0, MAX_NET_SLOTS)?;
        check("boot_timeout_s", self.boot_timeout_s, 1, 600)?;
        check("request_timeout_s", self.request_timeout_s, 1, 600)?;
        check_parameters("kernel_parameters", &self.kernel_parameters)?;
        let mut paths: Vec<(&str, &Path)> = vec![
            ("kernel", &self.kernel),
            ("image", &self.image),
            ("state_dir", &self.state_dir),
            ("template_dir", &self.template_dir),
            ("snapshot_dir", &self.snapshot_dir),
        ];
        paths.extend(self.vmm.as_deref().map(|path| ("vmm", path)));
        paths.extend(self.timeline_dir.as_deref().map(|path| ("timeline_dir", path)));
        for (field, path) in paths {
            if !path.is_absolute() {
                return Err(value(field, path.display(), "an absolute path is needed"));
            }
        }
        Ok(())
    }

    /// Applies a sandbox's Kata annotations. Only those listed in `enable_annotations` are allowed;
    /// every other one below [`ANNOTATION_PREFIX`] is refused by name.
    ///
    /// # Errors
    /// [`ConfigError::Annotation`], or [`ConfigError::Value`] for a value out of range.
    pub fn apply_annotations<'a>(
        &mut self,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<(), ConfigError> {
        // In a fixed order, so that the same sandbox always gets the same error.
        let sorted: BTreeMap<_, _> = annotations
            .into_iter()
            .filter(|(name, _)| name.starts_with(ANNOTATION_PREFIX))
            .collect();
        for (name, text) in sorted {
            let refuse = |reason| ConfigError::Annotation {
                name: name.clone(),
                reason,
            };
            let key = name
                .strip_prefix(HYPERVISOR_PREFIX)
                .ok_or_else(|| refuse("it has no meaning for this runtime"))?;
            if !matches!(key, "default_vcpus" | "default_memory" | "kernel_params") {
                return Err(refuse("it has no meaning for this runtime"));
            }
            if !self.enable_annotations.iter().any(|enabled| enabled == key) {
                return Err(refuse("the configuration does not enable it"));
            }
            match key {
                "default_vcpus" => {
                    self.vcpus = parse(name, text)?;
                    check(name, self.vcpus, 1, MAX_VCPUS)?;
                }
                "default_memory" => {
                    self.memory_mib = parse(name, text)?;
                    check(name, self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
                }
                _ => {
                    let joined = format!("{} {text}", self.kernel_parameters);
                    self.kernel_parameters = joined.trim().to_owned();
                    check_parameters(name, &self.kernel_parameters)?;
                }
            }
        }
        Ok(())
    }

    /// The VMM program that will be run.
    #[must_use]
    pub fn vmm_path(&self) -> PathBuf {
        const NAME: &str = "bulkhead-vmm";
        if let Some(path) = &self.vmm {
            return path.clone();
        }
        std::env::current_exe()
            .ok()
            .and_then(|program| program.parent().map(|dir| dir.join(NAME)))
            .filter(|path| path.exists())
            .unwrap_or_else(|| Path::new("/usr/local/libexec/bulkhead").join(NAME))
    }
}

fn value(field: &str, value: impl std::fmt::Display, reason: &str) -> ConfigError {
    ConfigError::Value {
        field: field.into(),
        value: value.to_string(),
        reason: reason.into(),
    }
}

fn check<T: PartialOrd + std::fmt::Display>(
    field: &str,
    got: T,
    least: T,
    most: T,
) -> Result<(), ConfigError> {
    if got < least || got > most {
        return Err(value(field, got, &format!("{least} to {most} is allowed")));
    }
    Ok(())
}

fn check_parameters(field: &str, text: &str) -> Result<(), ConfigError> {
    if text.len() > MAX_KERNEL_PARAMETERS {
        let reason = format!("{MAX_KERNEL_PARAMETERS} bytes are allowed");
        return Err(value(field, format_args!("({} bytes)", text.len()), &reason));
    }
    if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(value(
            field,
            text.escape_debug(),
            "only printable ASCII is allowed",
        ));
    }
    Ok(())
}

fn parse<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, ConfigError> {
    text.trim()
        .parse()
        .map_err(|_| value(field, text, "a whole number in range is needed"))
}
