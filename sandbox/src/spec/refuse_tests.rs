#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn spec(change: impl FnOnce(&mut Value)) -> Spec {
    let mut value = json!({
        "ociVersion": "1.1.0",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/cni-1"},
        ]},
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn without(kind: &str) -> Spec {
    spec(|value| {
        let list = value["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|namespace| namespace["type"] != kind);
    })
}

fn with(namespace: Value) -> Spec {
    spec(|value| {
        let list = value["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|other| other["type"] != namespace["type"]);
        list.push(namespace);
    })
}

fn refusal(spec: &Spec, role: Role) -> String {
    check(spec, role).unwrap_err().to_string()
}

const ROLES: [Role; 3] = [Role::Single, Role::Sandbox, Role::Container];

#[test]
fn ordinary_specifications_pass() {
    for role in ROLES {
        check(&spec(|_| {}), role).unwrap();
        check(&with(json!({"type": "cgroup"})), role).unwrap();
    }
    // A pod's containers name their sandbox's namespaces.
    for kind in ["pid", "ipc", "uts", "network"] {
        check(
            &with(json!({"type": kind, "path": "/proc/1/ns/x"})),
            Role::Container,
        )
        .unwrap();
    }
    for kind in ["ipc", "uts", "network"] {
        check(&without(kind), Role::Container).unwrap();
        let pinned = with(json!({"type": kind, "path": format!("/var/run/{kind}ns/x")}));
        check(&pinned, Role::Sandbox).unwrap();
    }
}

#[test]
fn namespaces_of_the_host_are_refused() {
    for role in [Role::Single, Role::Sandbox] {
        assert!(matches!(
            check(&without("network"), role),
            Err(SpecError::HostNetwork)
        ));
        assert!(
            refusal(&without("pid"), role)
                .starts_with("linux.namespaces: the host's pid namespace (hostPID)")
        );
        assert!(refusal(&without("ipc"), role).contains("(hostIPC)"));
        assert!(refusal(&without("uts"), role).contains("uts"));
        for kind in ["pid", "ipc", "uts", "mount", "cgroup"] {
            if role == Role::Sandbox && ["ipc", "uts"].contains(&kind) {
                continue;
            }
            let joined = with(json!({"type": kind, "path": "/proc/1/ns/x"}));
            assert!(refusal(&joined, role).contains("joining a"), "{kind}");
        }
    }
    assert!(refusal(&without("pid"), Role::Container).contains("(hostPID)"));
    let mount = with(json!({"type": "mount", "path": "/proc/1/ns/mnt"}));
    assert!(refusal(&mount, Role::Container).contains("joining a"));
}

#[test]
fn user_and_time_namespaces_are_refused() {
    let mapped = spec(|value| {
        value["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 65536, "size": 65536}])
    });
    for role in ROLES {
        assert!(refusal(&with(json!({"type": "user"})), role).contains("hostUsers"));
        assert!(refusal(&mapped, role).contains("hostUsers"));
        assert!(refusal(&with(json!({"type": "time"})), role).contains("time namespace"));
    }
}

#[test]
fn bidirectional_and_mapped_mounts_are_refused() {
    let mount = |options: Value| {
        spec(|value| {
            let mounts = value["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/data", "type": "bind", "source": "/x", "options": options}));
        })
    };
    for option in ["shared", "rshared"] {
        let text = refusal(&mount(json!(["rbind", option])), Role::Container);
        assert!(
            text.starts_with("mounts.options:") && text.contains("/data"),
            "{text}"
        );
    }
    for option in ["rprivate", "rslave", "ro"] {
        check(&mount(json!(["rbind", option])), Role::Container).unwrap();
    }
    let mapped = spec(|value| {
        value["mounts"][0]["uidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    });
    assert!(refusal(&mapped, Role::Container).starts_with("mounts.uidMappings"));
}

#[test]
fn devices_and_hooks_are_refused_by_name() {
    let device = |path: &str| {
        spec(|value| value["linux"]["devices"] = json!([{"path": path, "type": "c", "major": 1, "minor": 3}]))
    };
    for role in ROLES {
        check(&device("/dev/null"), role).unwrap();
        assert!(refusal(&device("/dev/kvm"), role).contains("/dev/kvm"));
        // What the guest has itself, and not another device by its name.
        let tun = |minor: i64| {
            spec(|value| {
                value["linux"]["devices"] =
                    json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": minor}]);
            })
        };
        check(&tun(200), role).unwrap();
        assert!(refusal(&tun(232), role).contains("/dev/net/tun"));
        let hooks =
            |list: Value| spec(|value| value["hooks"] = json!({"prestart": [], "createRuntime": list}));
        check(&hooks(json!([])), role).unwrap();
        assert!(refusal(&hooks(json!([{"path": "/bin/true"}])), role).contains("createRuntime"));
    }
}
