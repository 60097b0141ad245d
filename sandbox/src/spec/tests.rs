#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn parse(value: Value) -> Spec {
    serde_json::from_value(value).unwrap()
}

fn base(mounts: Value) -> Spec {
    parse(json!({"ociVersion": "1.1.0", "mounts": mounts, "linux": {}}))
}

fn directory(_: &Path) -> std::io::Result<SourceKind> {
    Ok(SourceKind::Directory)
}

fn run(spec: Spec) -> Result<(Value, Vec<Volume>), SpecError> {
    rewrite(spec, directory).map(|rewritten| {
        let volumes = rewritten.volumes.clone();
        let sources: Vec<_> = (0..volumes.len())
            .map(|n| PathBuf::from(format!("/guest/{n}")))
            .collect();
        let json = rewritten.finish(&sources).unwrap();
        (serde_json::from_slice(&json).unwrap(), volumes)
    })
}

#[test]
fn guest_file_systems_stay() {
    let mounts = json!([
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    ]);
    let (json, volumes) = run(base(mounts.clone())).unwrap();
    assert_eq!(json["mounts"], mounts);
    assert!(volumes.is_empty());
}

#[test]
fn bind_mounts_become_volumes() {
    let (json, volumes) = run(base(json!([
        {"destination": "/etc/hosts", "type": "bind", "source": "/a/hosts", "options": ["rbind", "ro"]},
        {"destination": "/data", "source": "/b", "options": ["bind", "rw"]},
    ])))
    .unwrap();
    assert_eq!(json["mounts"][0]["source"], "/guest/0");
    assert_eq!(json["mounts"][1]["source"], "/guest/1");
    assert_eq!(json["mounts"][1]["type"], "bind");
    assert_eq!(json["mounts"][0]["options"], json!(["rbind", "ro"]));
    assert_eq!(volumes[0].source, Path::new("/a/hosts"));
    assert!(volumes[0].options.read_only() && !volumes[1].options.read_only());
}

#[test]
fn shared_memory_and_devices_are_the_guests() {
    let (json, volumes) = run(base(json!([
        {"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm", "options": ["rbind"]},
        {"destination": "/dev/fuse", "type": "bind", "source": "/dev/fuse", "options": ["bind"]},
    ])))
    .unwrap();
    assert_eq!(json["mounts"][0]["source"], GUEST_SHM);
    assert_eq!(json["mounts"][1]["source"], "/dev/fuse");
    assert!(volumes.is_empty());
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    let socket = |_: &Path| Ok(SourceKind::Other("a socket"));
    let spec = base(json!([{"destination": "/s", "type": "bind", "source": "/run/docker.sock"}]));
    let error = rewrite(spec, socket).unwrap_err();
    assert!(
        error.to_string().contains("/run/docker.sock (a socket)"),
        "{error}"
    );
    let missing = |_: &Path| Err(std::io::Error::from(std::io::ErrorKind::NotFound));
    let spec = base(json!([{"destination": "/s", "type": "bind", "source": "/gone"}]));
    assert!(rewrite(spec, missing).unwrap_err().to_string().contains("/gone"));
    let error = run(base(
        json!([{"destination": "/s", "type": "nfs", "source": "x:/"}]),
    ))
    .unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented);
}

#[test]
fn host_labels_and_paths_are_removed() {
    let (json, _) = run(parse(json!({
        "ociVersion": "1.1.0",
        "process": {"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}, "apparmorProfile": "p",
                    "selinuxLabel": "l", "noNewPrivileges": true},
        "linux": {"cgroupsPath": "/a/b", "mountLabel": "m"},
    })))
    .unwrap();
    assert_eq!(json["process"]["noNewPrivileges"], true);
    for (object, key) in [
        ("process", "apparmorProfile"),
        ("process", "selinuxLabel"),
        ("linux", "cgroupsPath"),
        ("linux", "mountLabel"),
    ] {
        assert!(json[object].get(key).is_none_or(Value::is_null), "{key}");
    }
}

#[test]
fn the_network_namespace_is_found() {
    let with = |namespaces| parse(json!({"ociVersion": "1.1.0", "linux": {"namespaces": namespaces}}));
    assert_eq!(
        network_namespace(&with(json!([{"type": "network", "path": "/n"}]))).unwrap(),
        NetworkNamespace::Path("/n".into())
    );
    assert_eq!(
        network_namespace(&with(json!([{"type": "network"}]))).unwrap(),
        NetworkNamespace::Fresh
    );
    assert!(matches!(
        network_namespace(&with(json!([{"type": "pid"}]))),
        Err(SpecError::HostNetwork)
    ));
}

proptest! {
    /// What is about the container and not about the host arrives in the guest as it was written.
    #[test]
    fn the_containers_own_is_kept(
        args in proptest::collection::vec(".{1,10}", 1..4),
        env in proptest::collection::vec("[A-Z]{1,4}=.{0,10}", 0..4),
        cwd in "(/[a-z]{1,5}){1,3}",
        ids in any::<[u32; 2]>(),
        sysctl in proptest::collection::hash_map("[a-z.]{1,10}", "[0-9]{1,4}", 0..3),
        limits in any::<(u32, u32, u32)>(),
        masked in proptest::collection::vec("(/[a-z]{1,5}){1,2}", 0..3),
    ) {
        let (memory, quota, pids) = limits;
        let own = json!({
            "process": {
                "user": {"uid": ids[0], "gid": ids[1]}, "args": args, "env": env, "cwd": cwd,
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": ids[0], "hard": ids[1]}],
                "noNewPrivileges": true, "oomScoreAdj": -5,
            },
            "linux": {
                "sysctl": sysctl, "maskedPaths": masked,
                "resources": {
                    "memory": {"limit": memory, "swap": memory}, "cpu": {"quota": quota, "cpus": "0-1"},
                    "pids": {"limit": pids}, "unified": {"memory.high": "5"},
                    "hugepageLimits": [{"pageSize": "2MB", "limit": memory}],
                },
            },
        });
        let mut spec = own.clone();
        spec["ociVersion"] = json!("1.1.0");
        let (arrived, _) = run(parse(spec)).unwrap();
        let kept = |part: &Value, whole: &Value| {
            part.as_object().unwrap().iter().all(|(name, value)| whole.get(name) == Some(value))
        };
        prop_assert!(kept(&own["process"], &arrived["process"]), "{arrived}");
        for part in ["sysctl", "maskedPaths"] {
            prop_assert_eq!(&arrived["linux"][part], &own["linux"][part]);
        }
        let (sent, resources) = (&own["linux"]["resources"], &arrived["linux"]["resources"]);
        for part in ["memory", "cpu", "pids", "unified"] {
            prop_assert!(kept(&sent[part], &resources[part]), "{resources}");
        }
        prop_assert_eq!(&resources["hugepageLimits"], &sent["hugepageLimits"]);
    }

    /// Every bind mount gets the source that stands for it, and no other.
    #[test]
    fn volumes_get_their_sources(names in proptest::collection::vec("[a-z.]{1,6}", 0..10)) {
        let mounts: Vec<Value> = names
            .iter()
            .map(|name| json!({"destination": format!("/m/{name}"), "type": "bind", "source": format!("/h/{name}")}))
            .collect();
        let (json, volumes) = run(base(Value::Array(mounts))).unwrap();
        prop_assert_eq!(volumes.len(), names.len());
        for (number, volume) in volumes.iter().enumerate() {
            prop_assert_eq!(&json["mounts"][number]["source"], &json!(format!("/guest/{number}")));
            prop_assert_eq!(volume.mount, number);
        }
    }
}
