//! What no container in a virtual machine can have, found before anything is made for it.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Mount, Spec};

use super::{SpecError, network_namespace};

/// What a specification describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A container with a virtual machine of its own.
    Single,
    /// A pod's sandbox: no process runs for it in the guest.
    Sandbox,
    /// A container in a pod's virtual machine.
    Container,
}

/// Device nodes every container has, in the guest as on the host.
const STANDARD_DEVICES: [&str; 7] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
];

/// Device nodes that the guest's own kernel has, of the same numbers on every Linux: a container that asks for one gets
/// the guest's.
const GUEST_DEVICES: [(&str, i64, i64); 2] = [("/dev/net/tun", 10, 200), ("/dev/fuse", 10, 229)];

const NAMESPACES: &str = "linux.namespaces";

/// Checks that nothing is asked for that a virtual machine cannot give.
///
/// # Errors
/// [`SpecError::HostNetwork`], [`SpecError::Unsupported`], naming the field.
pub fn check(spec: &Spec, role: Role) -> Result<(), SpecError> {
    if role != Role::Container {
        network_namespace(spec)?;
    }
    if let Some(linux) = spec.linux() {
        check_namespaces(linux, role)?;
        check_devices(linux)?;
    }
    for mount in spec.mounts().iter().flatten() {
        check_mount(mount)?;
    }
    check_hooks(spec)
}

fn unsupported(field: &'static str, what: impl Into<String>, reason: &'static str) -> SpecError {
    SpecError::Unsupported {
        field,
        what: what.into(),
        reason,
    }
}

fn check_namespaces(linux: &Linux, role: Role) -> Result<(), SpecError> {
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    if mapped(linux.uid_mappings()) || mapped(linux.gid_mappings()) {
        return Err(user_namespace());
    }
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    for namespace in listed {
        check_namespace(namespace, role)?;
    }
    // Absent means the host's. A container of a pod has the pod's, except for its processes.
    let needed: &[_] = match role {
        Role::Container => &[(LinuxNamespaceType::Pid, "the host's pid namespace (hostPID)")],
        Role::Single | Role::Sandbox => &[
            (LinuxNamespaceType::Pid, "the host's pid namespace (hostPID)"),
            (LinuxNamespaceType::Ipc, "the host's ipc namespace (hostIPC)"),
            (LinuxNamespaceType::Uts, "the host's uts namespace"),
        ],
    };
    for (kind, what) in needed {
        if !listed.iter().any(|namespace| namespace.typ() == *kind) {
            return Err(unsupported(
                NAMESPACES,
                *what,
                "a virtual machine shares none with the host",
            ));
        }
    }
    Ok(())
}

fn user_namespace() -> SpecError {
    unsupported(
        NAMESPACES,
        "a user namespace (hostUsers: false)",
        "the virtual machine is what separates the pod's root from the host's",
    )
}

fn check_namespace(namespace: &LinuxNamespace, role: Role) -> Result<(), SpecError> {
    use LinuxNamespaceType as Kind;
    let joins = namespace
        .path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty());
    match namespace.typ() {
        Kind::User => Err(user_namespace()),
        Kind::Time => Err(unsupported(
            NAMESPACES,
            "a time namespace",
            "the guest agent makes none",
        )),
        Kind::Network => Ok(()),
        // In a pod these paths name its sandbox's, which CRI-O makes beforehand: the guest has its own.
        Kind::Ipc | Kind::Uts if role != Role::Single => Ok(()),
        Kind::Pid if role == Role::Container => Ok(()),
        kind if joins => Err(unsupported(
            NAMESPACES,
            format!("joining a {kind} namespace by path"),
            "a virtual machine can share none with other containers or the host",
        )),
        _ => Ok(()),
    }
}

fn check_devices(linux: &Linux) -> Result<(), SpecError> {
    let mut devices = linux.devices().iter().flatten();
    let foreign = devices.find(|device| {
        device.typ() != LinuxDeviceType::B
            && !STANDARD_DEVICES
                .iter()
                .any(|path| device.path() == Path::new(path))
            && !GUEST_DEVICES.iter().any(|(path, major, minor)| {
                device.path() == Path::new(path) && (device.major(), device.minor()) == (*major, *minor)
            })
    });
    match foreign {
        None => Ok(()),
        Some(device) => Err(unsupported(
            "linux.devices",
            device.path().display().to_string(),
            "devices of the host other than disks cannot be passed to the virtual machine \
             (for privileged pods set privileged_without_host_devices for this runtime)",
        )),
    }
}

fn check_mount(mount: &Mount) -> Result<(), SpecError> {
    let on = || mount.destination().display();
    let mut options = mount.options().iter().flatten();
    if let Some(option) = options.find(|option| matches!(option.as_str(), "shared" | "rshared")) {
        return Err(unsupported(
            "mounts.options",
            format!("{option} on {} (bidirectional propagation)", on()),
            "a mount made in the virtual machine cannot appear on the host",
        ));
    }
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    if mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
        return Err(unsupported(
            "mounts.uidMappings",
            format!("an id-mapped mount on {}", on()),
            "it belongs to a user namespace",
        ));
    }
    Ok(())
}

fn check_hooks(spec: &Spec) -> Result<(), SpecError> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let text = serde_json::to_value(hooks).map_err(SpecError::Encode)?;
    let used = text.as_object().and_then(|kinds| {
        kinds
            .iter()
            .find(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty()))
    });
    match used {
        None => Ok(()),
        Some((kind, _)) => Err(unsupported(
            "hooks",
            kind.clone(),
            "this version runs no OCI hooks",
        )),
    }
}

#[cfg(test)]
#[path = "refuse_tests.rs"]
mod tests;
