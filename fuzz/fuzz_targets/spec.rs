//! The way of an OCI specification: what containerd writes into `config.json`, what the sandbox makes of it for the
//! guest, and what the agent makes of that; and the configuration that it meets.
//!
//! The input is JSON texts with zeros between them: a specification, a configuration, the resources of an update, a
//! process. A finding is also a specification for the guest that has what it must not have: a mount that leads out
//! of the container's root, a namespace of another, a setting outside its group, a VM larger than was configured.

#![no_main]

use std::io::{Error, ErrorKind, Result};
use std::path::{Component, Path, PathBuf};

use bulkhead_agent::cgroup::DeviceRules;
use bulkhead_agent::container::spec::{DeviceNode, Guest, adapt, adapt_process};
use bulkhead_fuzz::pod::check_settings;
use bulkhead_sandbox::Role;
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::resources::{Demand, Host, Sizing};
use bulkhead_sandbox::spec::{self, SourceKind};
use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Process, Spec};

/// A host on which the name of a path says what it is.
fn probe(path: &Path) -> Result<SourceKind> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(match name.bytes().next().unwrap_or(b'd') % 8 {
        0 | 4 => SourceKind::Directory,
        1 | 5 => SourceKind::File,
        2 => SourceKind::BlockDevice,
        3 => SourceKind::Other("a socket"),
        _ => return Err(Error::from(ErrorKind::NotFound)),
    })
}

fn json<T: serde::de::DeserializeOwned>(text: &[u8]) -> Option<T> {
    serde_json::from_slice(text).ok()
}

fn sizing(config: &Configuration, spec: &Spec, update: Option<&LinuxResources>) {
    let host = Host {
        processors: 4,
        memory_mib: 8192,
    };
    let mut sizing = Sizing::new(config, host, Demand::of_sandbox(spec));
    let check = |sizing: &Sizing| {
        let (boot, wanted) = (sizing.boot(), sizing.wanted());
        let most = u64::from(boot.memory_mib) + u64::from(sizing.hotplug_mib());
        assert!((1..=sizing.max_vcpus()).contains(&boot.vcpus));
        assert!((1..=sizing.max_vcpus()).contains(&wanted.vcpus));
        assert!(u64::from(wanted.memory_mib) <= most, "{wanted:?} of {most}");
        assert!(sizing.hotplug_mib().is_multiple_of(128));
        let limits = sizing.host_limits(sizing.hotplug_mib());
        assert!(limits.memory_max.is_none_or(|bytes| bytes > most << 20));
    };
    check(&sizing);
    sizing.add("container", Demand::of_container(spec));
    check(&sizing);
    let _ = sizing.guest_cpus("container");
    if let Some(update) = update {
        sizing.update("container", update);
        check(&sizing);
        sizing.update_pod(update);
        check(&sizing);
    }
    sizing.remove("container");
    check(&sizing);
}

/// From the host's specification to JSON for the agent.
fn for_guest(spec: Spec) -> Option<Vec<u8>> {
    let rewritten = spec::rewrite(spec, probe).ok()?;
    let sources: Vec<PathBuf> = (0..rewritten.volumes.len())
        .map(|number| Path::new(spec::GUEST_SHARED).join(number.to_string()))
        .collect();
    Some(rewritten.finish(&sources).expect("it can be written"))
}

fn in_guest(text: &[u8]) {
    let spec: Spec = json(text).expect("the sandbox wrote it");
    for mount in spec.mounts().iter().flatten() {
        let options = mount.options().as_deref().unwrap_or_default();
        let is_bind = mount.typ().as_deref() == Some("bind") || options.iter().any(|option| option == "bind");
        let source = mount.source().clone().unwrap_or_default();
        let known = ["/run/bulkhead", "/dev"]
            .iter()
            .any(|known| source.starts_with(known));
        assert!(
            !is_bind || known || source.starts_with("/etc"),
            "bind mount of {}",
            source.display()
        );
    }
    let guest = Guest {
        root: Path::new("/run/bulkhead/containers/id/rootfs"),
        cgroup: "/id".into(),
        terminal: false,
        pid_namespace: None,
        device: &|path| {
            path.starts_with("/dev").then_some(DeviceNode {
                block: false,
                major: 1,
                minor: 3,
            })
        },
    };
    let Ok(adapted) = adapt(spec, &guest) else { return };
    let spec = &adapted.spec;
    assert_eq!(
        spec.root().as_ref().map(|root| root.path().as_path()),
        Some(guest.root)
    );
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination();
        assert!(destination.is_absolute());
        assert!(destination.components().all(|part| part != Component::ParentDir));
    }
    let linux = spec.linux().as_ref().expect("it has this part");
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    for kind in [LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup] {
        assert_eq!(namespaces.iter().filter(|one| one.typ() == kind).count(), 1);
    }
    for namespace in &namespaces {
        assert!(namespace.path().is_none(), "another's namespace");
        let own = [
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Cgroup,
            LinuxNamespaceType::Pid,
        ];
        assert!(own.contains(&namespace.typ()));
    }
    assert!(linux.resources().is_none() && linux.sysctl().is_none() && spec.hooks().is_none());
    let process = spec.process().as_ref().expect("it has this part");
    let capabilities = process.capabilities().as_ref().expect("they are always given");
    assert!(capabilities.bounding().is_some() && capabilities.effective().is_some());
    check_settings(&adapted.resources);
    let rules = adapted.resources.devices().clone().unwrap_or_default();
    let _ = DeviceRules::new(&rules, &linux.devices().clone().unwrap_or_default());
    // What libcontainer reads is what was decided.
    let text = serde_json::to_vec(spec).expect("it can be written");
    let again: Spec = json(&text).expect("it was written");
    // Not byte by byte: sets of capabilities have no order.
    assert!(again == *spec);
    let _ = adapt(again, &guest).map(|adapted| assert!(adapted.hostname.is_none()));
}

fuzz_target!(|data: &[u8]| {
    let mut texts = data.split(|byte| *byte == 0);
    let mut next = || texts.next().unwrap_or_default();
    let (spec, configuration, update, process) = (next(), next(), next(), next());
    let mut configuration: Configuration = json(configuration).unwrap_or_default();
    if configuration.validate().is_err() {
        configuration = Configuration::default();
    }
    let update: Option<LinuxResources> = json(update);
    if let Some(update) = &update {
        check_settings(update);
    }
    if let Ok(text) = spec::rewrite_process(process) {
        let mut process: Process = json(&text).expect("the sandbox wrote it");
        let _ = adapt_process(&mut process, true, &mut Vec::new());
    }
    let Some(mut spec) = json::<Spec>(spec) else {
        return;
    };
    let annotations = spec::annotations(&spec);
    let mut annotated = configuration.clone();
    if annotated.apply_annotations(&annotations).is_ok() {
        // An annotation alone cannot make a configuration that could not be a file.
        let vcpus = annotated.max_vcpus.is_none_or(|most| annotated.vcpus <= most);
        let memory = annotated
            .max_memory_mib
            .is_none_or(|most| annotated.memory_mib <= most);
        assert!(annotated.validate().is_ok() || !vcpus || !memory);
        sizing(&annotated, &spec, update.as_ref());
    }
    let _ = spec::network_namespace(&spec);
    let _ = spec::pid_namespace_path(&spec);
    for role in [Role::Single, Role::Sandbox, Role::Container] {
        if spec::check(&spec, role).is_ok() {
            spec::add_mounts(&mut spec, ["hosts", "resolv.conf"]);
            if let Some(text) = for_guest(spec.clone()) {
                in_guest(&text);
            }
        }
    }
});
