//! Fits an OCI specification, written for a host, to the guest.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxDevice, LinuxDeviceType, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResources, LinuxSeccomp, LinuxSeccompAction, Process, Root, Spec,
};

/// What a guest cannot give.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// A part that every container needs is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has a value that makes no sense.
    #[error("{field} is invalid: {value:?}")]
    Invalid {
        /// Path of the field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// The feature does not exist in the guest.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

/// A device node of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// Block, else character.
    pub block: bool,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
}

/// What the adaptation needs to know of the guest.
pub struct Guest<'a> {
    /// Root directory of the container.
    pub root: &'a Path,
    /// cgroup path of the container within the hierarchy.
    pub cgroup: PathBuf,
    /// Whether the container's init process has a terminal.
    pub terminal: bool,
    /// File of the pid namespace the container joins; none: what the specification says, whatever path it names.
    pub pid_namespace: Option<PathBuf>,
    /// Looks a device node of the guest up.
    pub device: &'a dyn Fn(&Path) -> Option<DeviceNode>,
}

impl std::fmt::Debug for Guest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("root", &self.root)
            .field("cgroup", &self.cgroup)
            .finish_non_exhaustive()
    }
}

/// A specification libcontainer can execute, and what the agent does itself.
#[derive(Debug)]
pub struct Adapted {
    /// For libcontainer.
    pub spec: Spec,
    /// Limits, applied to the cgroup before any process is in it.
    pub resources: LinuxResources,
    /// Kernel parameters, set in the guest's own namespaces.
    pub sysctls: Vec<(String, String)>,
    /// Host name, if the container was to have one of its own.
    pub hostname: Option<String>,
    /// Domain name, likewise.
    pub domainname: Option<String>,
    /// What was left out and why, for the log.
    pub notices: Vec<String>,
}

/// Fits a container's specification to the guest.
///
/// The guest's network, IPC and UTS namespaces are the pod's, so the container gets none of its own, and what
/// would be set in them is set in the guest. Every container has a mount and a cgroup namespace. Limits are
/// taken out: the agent applies them. What only the host could do (hooks, AppArmor, SELinux, Intel RDT) is left
/// out with a notice.
///
/// # Errors
/// A part is missing, or a feature cannot be given (user and time namespaces, seccomp notification).
pub fn adapt(mut spec: Spec, guest: &Guest<'_>) -> Result<Adapted, SpecError> {
    let mut notices = Vec::new();
    if !spec.version().starts_with("1.") {
        return Err(invalid("ociVersion", spec.version()));
    }
    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    adapt_process(&mut process, guest.terminal, &mut notices)?;
    spec.set_process(Some(process));

    let mut root = Root::default();
    root.set_path(guest.root.to_owned());
    root.set_readonly(spec.root().as_ref().and_then(Root::readonly));
    spec.set_root(Some(root));

    if spec.hooks().is_some() {
        notices.push("hooks run on the host only".into());
        spec.set_hooks(None);
    }
    let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
    let domainname = spec.domainname().clone().filter(|name| !name.is_empty());
    spec.set_hostname(None).set_domainname(None);

    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let destination = Path::new("/").join(mount.destination());
        if destination.components().any(|part| part == Component::ParentDir) {
            return Err(invalid("mounts.destination", &destination.to_string_lossy()));
        }
        mount.set_destination(destination);
    }
    spec.set_mounts(Some(mounts));

    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    let own_uts = adapt_namespaces(&mut linux, guest.pid_namespace.as_ref())?;
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    let mut sysctls: Vec<_> = linux.sysctl().clone().unwrap_or_default().into_iter().collect();
    sysctls.sort();
    linux.set_sysctl(None);
    linux.set_cgroups_path(Some(guest.cgroup.clone()));
    if linux.mount_label().is_some() {
        linux.set_mount_label(None);
    }
    // libcontainer knows these values without "r" only, and applies them to everything below all the same.
    let propagation = linux.rootfs_propagation().as_deref();
    if let Some(name) = propagation.and_then(|name| name.strip_prefix('r')) {
        let name = name.to_owned();
        linux.set_rootfs_propagation(Some(name));
    }
    if linux.intel_rdt().is_some() {
        notices.push("Intel RDT is the host's".into());
        linux.set_intel_rdt(None);
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(SpecError::Unsupported("linux.netDevices"));
    }
    linux.set_net_devices(None);
    if let Some(seccomp) = linux.seccomp() {
        check_seccomp(seccomp)?;
    }
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.retain_mut(|device| {
        let known = adapt_device(device, guest.device);
        if !known {
            notices.push(format!(
                "device {} does not exist in the guest",
                device.path().display()
            ));
        }
        known
    });
    linux.set_devices(Some(devices));
    spec.set_linux(Some(linux));

    let (hostname, domainname) = if own_uts {
        (hostname, domainname)
    } else {
        (None, None)
    };
    Ok(Adapted {
        spec,
        resources,
        sysctls,
        hostname,
        domainname,
        notices,
    })
}

/// Fits the process of a container or of an exec to the guest.
///
/// # Errors
/// No program, or a relative working directory.
pub fn adapt_process(
    process: &mut Process,
    terminal: bool,
    notices: &mut Vec<String>,
) -> Result<(), SpecError> {
    match process.args().as_deref() {
        None | Some([]) => return Err(SpecError::Missing("process.args")),
        Some([program, ..]) if program.is_empty() => return Err(invalid("process.args[0]", program)),
        Some(args) => no_nul("process.args", args)?,
    }
    no_nul("process.env", process.env().as_deref().unwrap_or_default())?;
    if !process.cwd().is_absolute() {
        return Err(invalid("process.cwd", &process.cwd().to_string_lossy()));
    }
    process.set_terminal(Some(terminal));
    if let Some(profile) = process
        .apparmor_profile()
        .as_deref()
        .filter(|profile| !profile.is_empty())
    {
        notices.push(format!("AppArmor profile {profile} is the host's"));
    }
    process.set_apparmor_profile(None);
    if let Some(label) = process
        .selinux_label()
        .as_deref()
        .filter(|label| !label.is_empty())
    {
        notices.push(format!("SELinux label {label} is the host's"));
    }
    process.set_selinux_label(None);
    // libcontainer tells "false" from absent where it loads seccomp filters.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // Absent sets would leave the agent's own capabilities in place.
    let mut capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
    let sets = [
        capabilities.bounding(),
        capabilities.effective(),
        capabilities.permitted(),
    ];
    if sets.iter().any(|set| set.is_none()) {
        let or_empty = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
        let (bounding, effective, permitted) = (
            or_empty(capabilities.bounding()),
            or_empty(capabilities.effective()),
            or_empty(capabilities.permitted()),
        );
        capabilities
            .set_bounding(bounding)
            .set_effective(effective)
            .set_permitted(permitted);
    }
    process.set_capabilities(Some(capabilities));
    Ok(())
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None)
        .set_effective(None)
        .set_permitted(None)
        .set_inheritable(None)
        .set_ambient(None);
    none
}

/// Leaves the namespaces that a container has of its own; returns whether it was to have a UTS namespace.
fn adapt_namespaces(
    linux: &mut oci_spec::runtime::Linux,
    pid_namespace: Option<&PathBuf>,
) -> Result<bool, SpecError> {
    let mut own = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if pid_namespace.is_some() {
        own.push(LinuxNamespaceType::Pid);
    }
    let mut uts = false;
    for namespace in linux.namespaces().iter().flatten() {
        match namespace.typ() {
            LinuxNamespaceType::Network | LinuxNamespaceType::Ipc => (),
            LinuxNamespaceType::Uts => uts = true,
            LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup => (),
            LinuxNamespaceType::Pid if own.contains(&LinuxNamespaceType::Pid) => (),
            LinuxNamespaceType::Pid => own.push(LinuxNamespaceType::Pid),
            LinuxNamespaceType::User => return Err(SpecError::Unsupported("a user namespace")),
            LinuxNamespaceType::Time => return Err(SpecError::Unsupported("a time namespace")),
        }
    }
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    if mapped(linux.uid_mappings()) || mapped(linux.gid_mappings()) {
        return Err(SpecError::Unsupported("a user namespace"));
    }
    linux
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_time_offsets(None);
    let namespaces = own.into_iter().map(|kind| {
        let namespace = LinuxNamespaceBuilder::default().typ(kind);
        match pid_namespace {
            Some(path) if kind == LinuxNamespaceType::Pid => namespace.path(path).build(),
            _ => namespace.build(),
        }
    });
    let namespaces: Result<Vec<_>, _> = namespaces.collect();
    linux.set_namespaces(Some(
        namespaces.map_err(|error| invalid("linux.namespaces", &error.to_string()))?,
    ));
    Ok(uts)
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), SpecError> {
    let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
        || seccomp
            .syscalls()
            .iter()
            .flatten()
            .any(|call| call.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies
        || seccomp
            .listener_path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
    {
        return Err(SpecError::Unsupported("seccomp notification"));
    }
    Ok(())
}

/// Gives a device the guest's number; whether the guest has it at all. A host's number could name some other
/// device here. FIFOs have no number.
fn adapt_device(device: &mut LinuxDevice, lookup: &dyn Fn(&Path) -> Option<DeviceNode>) -> bool {
    let block = match device.typ() {
        LinuxDeviceType::P => return true,
        LinuxDeviceType::B => true,
        LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => false,
    };
    match lookup(device.path()) {
        Some(node) if node.block == block => {
            device.set_major(node.major).set_minor(node.minor);
            true
        }
        _ => false,
    }
}

fn invalid(field: &'static str, value: &str) -> SpecError {
    SpecError::Invalid {
        field,
        value: value.to_owned(),
    }
}

fn no_nul(field: &'static str, texts: &[String]) -> Result<(), SpecError> {
    match texts.iter().find(|text| text.contains('\0')) {
        Some(text) => Err(invalid(field, text)),
        None => Ok(()),
    }
}

/// Whether an id is one path component of harmless characters, as containerd's and Docker's ids are.
pub fn valid_id(id: &str) -> bool {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    (1..=128).contains(&id.len()) && id.chars().all(harmless) && !matches!(id, "." | "..")
}

/// Whether a path is absolute and has neither `..` nor NUL.
pub fn valid_path(path: &str) -> bool {
    let path_ref = Path::new(path);
    path_ref.is_absolute()
        && !path.contains('\0')
        && path_ref.components().all(|part| part != Component::ParentDir)
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
