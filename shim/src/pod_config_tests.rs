#![allow(clippy::unwrap_used)]

use bulkhead_sandbox::Role;
use bulkhead_sandbox::resources::Demand;
use bulkhead_sandbox::spec::{NetworkNamespace, SpecError, check, network_namespace};
use proptest::collection::hash_map;
use proptest::prelude::*;
use protobuf::Message;

use super::*;
use crate::cri::{
    LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    UserNamespace,
};

fn config(modes: NamespaceOption) -> PodSandboxConfig {
    PodSandboxConfig {
        hostname: "web".into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(modes).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn spec(modes: NamespaceOption) -> Spec {
    specification("p", &config(modes), "/var/run/netns/cni-1").unwrap()
}

#[test]
fn an_ordinary_pod_is_accepted() {
    let spec = spec(NamespaceOption::default());
    check(&spec, Role::Sandbox).unwrap();
    assert_eq!(
        network_namespace(&spec).unwrap(),
        NetworkNamespace::Path("/var/run/netns/cni-1".into())
    );
    assert_eq!(spec.hostname().as_deref(), Some("web"));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(
        linux.cgroups_path().as_deref(),
        Some(Path::new("/kubepods/pod1/p"))
    );
    // Nothing that Kubernetes shares between the containers of a pod is refused.
    let shared = NamespaceOption {
        pid: NamespaceMode::CONTAINER.into(),
        ..Default::default()
    };
    check(&self::spec(shared), Role::Sandbox).unwrap();
}

#[test]
fn namespaces_of_the_node_are_refused() {
    let node = NamespaceMode::NODE.into();
    let network = NamespaceOption {
        network: node,
        ..Default::default()
    };
    assert!(matches!(
        check(&spec(network), Role::Sandbox),
        Err(SpecError::HostNetwork)
    ));
    for (modes, field) in [
        (
            NamespaceOption {
                pid: node,
                ..Default::default()
            },
            "hostPID",
        ),
        (
            NamespaceOption {
                ipc: node,
                ..Default::default()
            },
            "hostIPC",
        ),
        (
            NamespaceOption {
                userns_options: Some(UserNamespace::default()).into(),
                ..Default::default()
            },
            "hostUsers",
        ),
    ] {
        let error = check(&spec(modes), Role::Sandbox).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn a_slice_gets_a_scope() {
    assert_eq!(
        cgroups_path("/kubepods.slice/kubepods-pod1.slice", "p").unwrap(),
        Path::new("kubepods-pod1.slice:cri-containerd:p")
    );
    assert_eq!(cgroups_path("", "p"), None);
    assert_eq!(cgroups_path("/", "p").unwrap(), Path::new("/p"));
}

#[test]
fn parameters_and_size_are_told_as_containerd_tells_them() {
    let mut config = config(NamespaceOption::default());
    config.annotations = [("io.katacontainers.x".to_owned(), "1".to_owned())].into();
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls = [
        ("net.ipv4.ping_group_range".to_owned(), "1 1".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ]
    .into();
    linux.resources = Some(LinuxContainerResources {
        cpu_quota: 50_000,
        memory_limit_in_bytes: 1 << 20,
        ..Default::default()
    })
    .into();
    let spec = specification("p", &config, "").unwrap();
    let sysctls = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
    assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
    assert_eq!(sysctls["net.ipv4.ping_group_range"], "1 1");
    assert_eq!(sysctls["kernel.shm_rmid_forced"], "1");
    let annotations = spec.annotations().clone().unwrap();
    assert_eq!(annotations["io.kubernetes.cri.sandbox-cpu-quota"], "50000");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "1048576");
    assert_eq!(annotations["io.katacontainers.x"], "1");
    assert_eq!(network_namespace(&spec).unwrap(), NetworkNamespace::Fresh);
}

#[test]
fn files_follow_the_description() {
    let host = |path: &str| format!("host {path}").into_bytes();
    let plain = files(&config(NamespaceOption::default()), host);
    assert_eq!(plain["resolv.conf"], b"host /etc/resolv.conf");
    assert_eq!(plain["hosts"], b"host /etc/hosts");
    assert_eq!(plain["hostname"], b"web\n");
    let dns = DNSConfig {
        servers: vec!["192.0.2.1".into(), "2001:db8::1".into()],
        searches: vec!["a.example".into(), "example".into()],
        options: vec!["ndots:5".into()],
        ..Default::default()
    };
    let config = PodSandboxConfig {
        dns_config: Some(dns).into(),
        ..Default::default()
    };
    assert_eq!(
        files(&config, host)["resolv.conf"],
        b"search a.example example\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5\n"
    );
}

#[test]
fn messages_are_read_by_their_numbers() {
    // Fields 2 and 8 {1, 2 {1 {2}}} of the description, and one that is not known here.
    let bytes = [
        0x12, 0x01, b'h', 0x42, 0x09, 0x0a, 0x01, b'/', 0x12, 0x04, 0x0a, 0x02, 0x10, 0x02, 0x1a, 0x01, b'l',
    ];
    let config = PodSandboxConfig::parse_from_bytes(&bytes).unwrap();
    assert_eq!(config.hostname, "h");
    assert_eq!(config.linux.cgroup_parent, "/");
    let modes = &config.linux.security_context.namespace_options;
    assert_eq!(modes.pid, NamespaceMode::NODE.into());
    assert!(is_pod("runtime.v1.PodSandboxConfig") && !is_pod("runtime.v1.Other"));
}

proptest! {
    /// What CRI says of a pod is read from the specification as if it had come from containerd's own.
    #[test]
    fn a_pods_description_arrives(
        hostname in "[a-z0-9-]{0,20}",
        annotations in hash_map("[a-z./]{1,12}", ".{0,12}", 0..4),
        sysctls in hash_map("net\\.[a-z.]{1,12}", "[0-9]{1,6}", 0..4),
        netns in "(/[a-z0-9]{1,8}){1,3}",
        [quota, shares, memory] in any::<[u32; 3]>(),
    ) {
        let mut config = config(NamespaceOption::default());
        config.hostname = hostname.clone();
        config.annotations = annotations.clone();
        let linux = config.linux.mut_or_insert_default();
        linux.sysctls = sysctls.clone();
        linux.resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: quota.into(),
            cpu_shares: shares.into(),
            memory_limit_in_bytes: memory.into(),
            ..Default::default()
        })
        .into();
        // As containerd sends it, and as the sandbox keeps it.
        let config = PodSandboxConfig::parse_from_bytes(&config.write_to_bytes().unwrap()).unwrap();
        let written = serde_json::to_vec(&specification("p", &config, &netns).unwrap()).unwrap();
        let spec: Spec = serde_json::from_slice(&written).unwrap();
        prop_assert_eq!(network_namespace(&spec).unwrap(), NetworkNamespace::Path(netns.into()));
        prop_assert_eq!(spec.hostname().as_deref(), Some(hostname.as_str()));
        let told = spec.annotations().clone().unwrap();
        prop_assert!(annotations.iter().all(|(name, value)| told.get(name) == Some(value)));
        let set = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        prop_assert!(sysctls.iter().all(|(name, value)| set.get(name) == Some(value)));
        // The same numbers as a container's limits ask for the same.
        let limits = serde_json::json!({
            "cpu": {"period": 100_000, "quota": quota, "shares": shares},
            "memory": {"limit": memory},
        });
        let mut demand = Demand::default();
        demand.update(&serde_json::from_value(limits).unwrap());
        let says = quota > 0 || memory > 0;
        prop_assert_eq!(Demand::of_sandbox(&spec), says.then_some(demand));
    }
}
