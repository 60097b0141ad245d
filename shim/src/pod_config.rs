//! A pod as CRI describes it, in the terms of an OCI specification.
//!
//! containerd's own sandbox controller makes a specification for the pause container out of the same
//! description. Making the same one here keeps one path for both: what a pod is, and what is refused, does not
//! depend on how containerd drives the shim.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Process, Spec};

use crate::cri::{DNSConfig, NamespaceMode, PodSandboxConfig};

/// Type of the options that describe a pod.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// Whether options of this type URL are a [`PodSandboxConfig`].
#[must_use]
pub fn is_pod(type_url: &str) -> bool {
    type_url.rsplit('/').next() == Some(TYPE)
}

/// What containerd sets for every pod unless its configuration or the pod says otherwise: ports below 1024 and
/// ping for every user.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// `oom_score_adj` that containerd gives to a pod's sandbox.
const OOM_SCORE_ADJ: i32 = -998;

/// The specification of the sandbox of pod `id`, with its network namespace at `netns`.
///
/// # Errors
/// A path is not usable.
pub fn specification(id: &str, config: &PodSandboxConfig, netns: &str) -> Result<Spec, OciSpecError> {
    let linux_config = config.linux.get_or_default();
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces(config, netns)?))
        .set_cgroups_path(cgroups_path(&linux_config.cgroup_parent, id))
        .set_sysctl(Some(sysctls(&linux_config.sysctls)))
        .set_resources(None)
        .set_masked_paths(None)
        .set_readonly_paths(None);
    let mut process = Process::default();
    process.set_oom_score_adj(Some(OOM_SCORE_ADJ));
    let mut spec = Spec::default();
    spec.set_hostname(Some(config.hostname.clone()))
        .set_annotations(Some(annotations(id, config)))
        .set_linux(Some(linux))
        .set_process(Some(process))
        .set_root(None)
        .set_mounts(None);
    Ok(spec)
}

fn namespaces(config: &PodSandboxConfig, netns: &str) -> Result<Vec<LinuxNamespace>, OciSpecError> {
    let context = config.linux.get_or_default().security_context.get_or_default();
    let modes = context.namespace_options.get_or_default();
    let on_node = |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode == NamespaceMode::NODE.into();
    let plain = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    let mut namespaces = vec![plain(LinuxNamespaceType::Uts)?, plain(LinuxNamespaceType::Mount)?];
    if !on_node(modes.network) {
        let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
        namespaces.push(match netns {
            "" => network.build()?,
            path => network.path(path).build()?,
        });
    }
    if !on_node(modes.pid) {
        namespaces.push(plain(LinuxNamespaceType::Pid)?);
    }
    if !on_node(modes.ipc) {
        namespaces.push(plain(LinuxNamespaceType::Ipc)?);
    }
    if modes
        .userns_options
        .as_ref()
        .is_some_and(|user| !on_node(user.mode))
    {
        namespaces.push(plain(LinuxNamespaceType::User)?);
    }
    Ok(namespaces)
}

/// As containerd does: a slice gets a scope of systemd, any other parent a directory.
fn cgroups_path(parent: &str, id: &str) -> Option<PathBuf> {
    let name = parent.rsplit('/').next().unwrap_or_default();
    match parent {
        "" => None,
        _ if name.ends_with(".slice") => Some(format!("{name}:cri-containerd:{id}").into()),
        _ => Some(Path::new(parent).join(id)),
    }
}

fn sysctls(wanted: &HashMap<String, String>) -> HashMap<String, String> {
    let defaults = SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut sysctls = HashMap::from(defaults);
    sysctls.extend(wanted.clone());
    sysctls
}

/// The pod's own annotations, and those with which containerd tells a sandbox's place and size.
fn annotations(id: &str, config: &PodSandboxConfig) -> HashMap<String, String> {
    let mut annotations = config.annotations.clone();
    annotations.extend([
        (
            "io.kubernetes.cri.container-type".to_owned(),
            "sandbox".to_owned(),
        ),
        ("io.kubernetes.cri.sandbox-id".to_owned(), id.to_owned()),
    ]);
    if let Some(resources) = config.linux.get_or_default().resources.as_ref() {
        for (name, value) in [
            ("cpu-period", resources.cpu_period),
            ("cpu-quota", resources.cpu_quota),
            ("cpu-shares", resources.cpu_shares),
            ("memory", resources.memory_limit_in_bytes),
        ] {
            annotations.insert(format!("io.kubernetes.cri.sandbox-{name}"), value.to_string());
        }
    }
    annotations
}

/// The files every container of the pod finds in its `/etc` unless something is mounted there. `host` reads a
/// file of the host.
#[must_use]
pub fn files(config: &PodSandboxConfig, host: impl Fn(&str) -> Vec<u8>) -> HashMap<String, Vec<u8>> {
    let resolv_conf = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns).into_bytes(),
        None => host("/etc/resolv.conf"),
    };
    HashMap::from([
        (
            "hostname".to_owned(),
            format!("{}\n", config.hostname).into_bytes(),
        ),
        ("hosts".to_owned(), host("/etc/hosts")),
        ("resolv.conf".to_owned(), resolv_conf),
    ])
}

/// resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
#[path = "pod_config_tests.rs"]
mod tests;
