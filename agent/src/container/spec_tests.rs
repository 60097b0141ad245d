#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn full_spec() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": false,
            "user": {"uid": 1000, "gid": 1000, "additionalGids": [10]},
            "args": ["sh"], "env": ["PATH=/bin"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:x",
            "noNewPrivileges": false
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "pod-1",
        "mounts": [{"destination": "proc", "type": "proc", "source": "proc"}],
        "hooks": {"prestart": [{"path": "/usr/bin/host-tool"}]},
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/var/run/netns/cni-1"}
            ],
            "cgroupsPath": "/kubepods/pod1/c1",
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            "resources": {"memory": {"limit": 1000}},
            "mountLabel": "x",
            "rootfsPropagation": "rslave",
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 1},
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
            ]
        }
    })
}

fn device(path: &Path) -> Option<DeviceNode> {
    (path == Path::new("/dev/fuse")).then_some(DeviceNode {
        block: false,
        major: 10,
        minor: 229,
    })
}

fn adapted(spec: Value) -> Result<Adapted, SpecError> {
    let guest = Guest {
        root: Path::new("/run/bulkhead/shared/c1/rootfs"),
        cgroup: "/bulkhead/c1".into(),
        terminal: true,
        pid_namespace: None,
        device: &device,
    };
    adapt(serde_json::from_value(spec).unwrap(), &guest)
}

#[test]
fn what_belongs_to_the_guest_is_taken_out() {
    let result = adapted(full_spec()).unwrap();
    let spec = serde_json::to_value(&result.spec).unwrap();
    let kinds: Vec<_> = spec["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| &n["type"])
        .collect();
    assert_eq!(kinds, ["mount", "cgroup", "pid"]);
    assert!(!spec["linux"]["namespaces"].to_string().contains("path"));
    assert_eq!(spec["linux"]["cgroupsPath"], "/bulkhead/c1");
    assert_eq!(
        spec["root"],
        json!({"path": "/run/bulkhead/shared/c1/rootfs", "readonly": true})
    );
    for absent in [
        "/hooks",
        "/hostname",
        "/linux/sysctl",
        "/linux/resources",
        "/linux/mountLabel",
    ] {
        assert_eq!(spec.pointer(absent), None, "{absent}");
    }
    assert_eq!(result.hostname.as_deref(), Some("pod-1"));
    assert_eq!(
        result.sysctls,
        [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())]
    );
    assert_eq!(result.resources.memory().unwrap().limit(), Some(1000));
    assert_eq!(spec["mounts"][0]["destination"], "/proc");
    assert_eq!(spec["linux"]["rootfsPropagation"], "slave");
    let devices = spec["linux"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(
        (&devices[0]["path"], &devices[0]["minor"]),
        (&json!("/dev/fuse"), &json!(229))
    );
    for word in ["hooks", "AppArmor", "SELinux", "/dev/sda"] {
        assert!(
            result.notices.iter().any(|notice| notice.contains(word)),
            "{word}: {:?}",
            result.notices
        );
    }
}

#[test]
fn the_process_keeps_what_it_asked_for() {
    let result = adapted(full_spec()).unwrap();
    let process = serde_json::to_value(result.spec.process()).unwrap();
    assert_eq!(process["user"]["additionalGids"], json!([10]));
    assert_eq!(process["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
    assert_eq!(process["terminal"], true);
    for absent in ["/noNewPrivileges", "/apparmorProfile", "/selinuxLabel"] {
        assert_eq!(process.pointer(absent), None, "{absent}");
    }
}

#[test]
fn absent_capabilities_are_none_not_all() {
    for capabilities in [json!(null), json!({}), json!({"bounding": ["CAP_CHOWN"]})] {
        let mut spec = full_spec();
        spec["process"]["capabilities"] = capabilities;
        let result = adapted(spec).unwrap();
        let sets = result
            .spec
            .process()
            .as_ref()
            .unwrap()
            .capabilities()
            .clone()
            .unwrap();
        assert_eq!(sets.effective().as_ref().map(|set| set.len()), Some(0));
        assert_eq!(sets.permitted().as_ref().map(|set| set.len()), Some(0));
        assert!(sets.bounding().is_some());
    }
}

#[test]
fn hostname_without_a_uts_namespace_is_not_the_containers() {
    let mut spec = full_spec();
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    let result = adapted(spec).unwrap();
    assert_eq!(result.hostname, None);
    assert_eq!(
        result
            .spec
            .linux()
            .as_ref()
            .unwrap()
            .namespaces()
            .as_ref()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn impossible_wishes_are_refused_by_name() {
    let cases = [
        ("/process", json!(null), "process is missing"),
        ("/process/args", json!([]), "process.args is missing"),
        (
            "/process/args",
            json!(["a\0b"]),
            "process.args is invalid: \"a\\0b\"",
        ),
        ("/process/cwd", json!("tmp"), "process.cwd is invalid: \"tmp\""),
        ("/linux", json!(null), "linux is missing"),
        (
            "/linux/namespaces",
            json!([{"type": "user"}]),
            "a user namespace is not supported",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "time"}]),
            "a time namespace is not supported",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "seccomp notification is not supported",
        ),
        (
            "/mounts/0/destination",
            json!("/a/../../b"),
            "mounts.destination is invalid: \"/a/../../b\"",
        ),
        ("/ociVersion", json!("2.0.0"), "ociVersion is invalid: \"2.0.0\""),
    ];
    for (pointer, value, error) in cases {
        let mut spec = full_spec();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        assert_eq!(adapted(spec).unwrap_err().to_string(), error);
    }
}

#[test]
fn ids() {
    for id in ["a", "pod-1_x.y+z", &"f".repeat(128)] {
        assert!(valid_id(id), "{id}");
    }
    for id in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"f".repeat(129)] {
        assert!(!valid_id(id), "{id}");
    }
}

proptest! {
    /// What a guest can give as it is written stays so, also on the way to libcontainer, and a second time.
    #[test]
    fn what_needs_no_change_is_kept(
        args in prop::collection::vec("[^\0]{1,10}", 1..4),
        env in prop::collection::vec("[A-Z]{1,4}=[^\0]{0,10}", 0..4),
        cwd in "(/[a-z]{1,5}){1,3}",
        user in any::<[u32; 2]>(),
        destinations in prop::collection::vec("(/[a-z]{1,5}){1,3}", 0..4),
        masked in prop::collection::vec("(/[a-z]{1,5}){1,2}", 0..3),
    ) {
        let mounts: Vec<Value> = destinations
            .iter()
            .map(|to| json!({"destination": to, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m"]}))
            .collect();
        let mut spec = full_spec();
        spec["process"]["args"] = json!(args);
        spec["process"]["env"] = json!(env);
        spec["process"]["cwd"] = json!(cwd);
        spec["process"]["user"] = json!({"uid": user[0], "gid": user[1], "additionalGids": user});
        spec["mounts"] = json!(mounts);
        spec["linux"]["maskedPaths"] = json!(masked);
        let first = serde_json::to_value(&adapted(spec.clone()).unwrap().spec).unwrap();
        for field in ["args", "env", "cwd", "user"] {
            prop_assert_eq!(&first["process"][field], &spec["process"][field]);
        }
        prop_assert_eq!(&first["mounts"], &spec["mounts"]);
        prop_assert_eq!(&first["linux"]["maskedPaths"], &spec["linux"]["maskedPaths"]);
        let second = serde_json::to_value(&adapted(first.clone()).unwrap().spec).unwrap();
        prop_assert_eq!(&second["process"]["user"], &first["process"]["user"]);
        prop_assert_eq!(&second["linux"]["namespaces"], &first["linux"]["namespaces"]);
        prop_assert_eq!(&second["mounts"], &first["mounts"]);
    }

    #[test]
    fn a_valid_id_names_a_child(id in "\\PC{1,20}") {
        if valid_id(&id) {
            let joined = Path::new("/run/x").join(&id);
            prop_assert_eq!(joined.parent(), Some(Path::new("/run/x")));
            prop_assert_eq!(joined.components().count(), 4);
        }
    }

    #[test]
    fn a_valid_path_cannot_climb(path in "[./a]{1,16}") {
        if valid_path(&path) {
            prop_assert!(path.starts_with('/') && !path.split('/').any(|part| part == ".."));
        }
    }
}
