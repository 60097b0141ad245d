//! What is changed in the OCI specification of a saved container for one that takes its place. Everything else stays.

use std::path::Path;

use anyhow::{Context, bail};
use bulkhead_sandbox::snapshot::ANNOTATION;
use serde_json::{Value, json};

/// Annotations that name a container's sandbox: containerd's CRI plugin, then CRI-O.
const SANDBOX_IDS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// What is new.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The pod's id.
    pub pod: &'a str,
    /// The snapshot, for the container that stands for the pod.
    pub snapshot: Option<&'a str>,
    /// Path of the network namespace.
    pub network: Option<&'a str>,
}

/// Changes a specification:
///
/// * the annotation that names the snapshot is set on the container that stands for the pod;
/// * annotations that name a sandbox name the new one;
/// * the last part of the cgroup's path is the new id;
/// * the host name goes, so that the pod's id is;
/// * the network namespace is the one given, if one is.
///
/// # Errors
/// A part is of another type than the OCI specification says.
pub fn rewrite(spec: &mut Value, change: &Change<'_>) -> anyhow::Result<()> {
    let spec = spec.as_object_mut().context("The specification is no object")?;
    spec.remove("hostname");
    let annotations = match spec.entry("annotations").or_insert(Value::Null) {
        null @ Value::Null => {
            *null = json!({});
            null.as_object_mut()
        }
        other => other.as_object_mut(),
    };
    let annotations = annotations.context("annotations is no object")?;
    for key in SANDBOX_IDS {
        if let Some(id) = annotations.get_mut(key) {
            *id = change.pod.into();
        }
    }
    if let Some(name) = change.snapshot {
        annotations.insert(ANNOTATION.to_owned(), name.into());
    }
    if let Some(path) = spec
        .get_mut("linux")
        .and_then(|linux| linux.get_mut("cgroupsPath"))
    {
        let old = path.as_str().context("linux.cgroupsPath is no text")?;
        *path = cgroup(old, change.id).into();
    }
    if let Some(path) = change.network {
        let Some(network) = namespaces(spec.get_mut("linux"))
            .iter_mut()
            .find(|namespace| is_network(namespace))
        else {
            bail!("linux.namespaces has no network");
        };
        network["path"] = path.into();
    }
    Ok(())
}

/// Path of the network namespace that the specification names.
pub fn network(spec: &Value) -> Option<&Path> {
    let namespaces = spec.get("linux")?.get("namespaces")?.as_array()?;
    let network = namespaces.iter().find(|namespace| is_network(namespace))?;
    let path = network.get("path")?.as_str()?;
    (!path.is_empty()).then(|| Path::new(path))
}

fn namespaces(linux: Option<&mut Value>) -> &mut [Value] {
    linux
        .and_then(|linux| linux.get_mut("namespaces")?.as_array_mut())
        .map(Vec::as_mut_slice)
        .unwrap_or_default()
}

fn is_network(namespace: &Value) -> bool {
    namespace.get("type").and_then(Value::as_str) == Some("network")
}

/// The cgroup beside `old` with another name: the last part of a path, or of systemd's `slice:prefix:name`. None stays none.
fn cgroup(old: &str, id: &str) -> String {
    let trimmed = old.trim_end_matches('/');
    if trimmed.is_empty() {
        return old.to_owned();
    }
    let kept = trimmed.rfind([':', '/']).map_or(0, |end| end + 1);
    format!("{}{id}", &trimmed[..kept])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const CHANGE: Change<'_> = Change {
        id: "new-c",
        pod: "new",
        snapshot: None,
        network: None,
    };

    fn rewritten(spec: &Value, change: &Change<'_>) -> Value {
        let mut spec = spec.clone();
        rewrite(&mut spec, change).unwrap();
        spec
    }

    #[test]
    fn only_what_is_the_old_pods_own_is_changed() {
        let spec = json!({
            "ociVersion": "1.2.0",
            "hostname": "web",
            "domainname": "d",
            "process": {"args": ["sleep", "1"], "terminal": true, "env": ["A=1"]},
            "root": {"path": "rootfs"},
            "annotations": {"k": "v", "io.kubernetes.cri.sandbox-id": "old", "io.kubernetes.cri-o.SandboxID": "old"},
            "linux": {
                "cgroupsPath": "/default/old",
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/old"}],
                "resources": {"memory": {"limit": 9_223_372_036_854_775_807_i64}},
            },
            "later": {"versions": ["keep"]},
        });
        let mut expected = spec.clone();
        expected.as_object_mut().unwrap().remove("hostname");
        expected["annotations"]["io.kubernetes.cri.sandbox-id"] = "new".into();
        expected["annotations"]["io.kubernetes.cri-o.SandboxID"] = "new".into();
        expected["linux"]["cgroupsPath"] = "/default/new-c".into();
        assert_eq!(rewritten(&spec, &CHANGE), expected);
        expected["annotations"][ANNOTATION] = "warm".into();
        expected["linux"]["namespaces"][1]["path"] = "/run/netns/new".into();
        let all = Change {
            snapshot: Some("warm"),
            network: Some("/run/netns/new"),
            ..CHANGE
        };
        assert_eq!(rewritten(&spec, &all), expected);
    }

    #[test]
    fn what_is_not_there_is_not_made_but_for_the_snapshot() {
        let change = Change {
            snapshot: Some("warm"),
            ..CHANGE
        };
        for spec in [json!({}), json!({"annotations": null})] {
            let expected = json!({"annotations": {ANNOTATION: "warm"}});
            assert_eq!(rewritten(&spec, &change), expected);
        }
        // A fork of a fork begins from its own snapshot.
        let before = json!({"annotations": {ANNOTATION: "cold"}});
        assert_eq!(rewritten(&before, &change)["annotations"][ANNOTATION], "warm");
    }

    #[test]
    fn cgroups_are_beside_the_old_ones() {
        for (old, new) in [
            ("/default/a", "/default/id"),
            ("/default/a/", "/default/id"),
            ("a", "id"),
            ("/a", "/id"),
            ("system.slice:bulkhead:a", "system.slice:bulkhead:id"),
            ("", ""),
        ] {
            assert_eq!(cgroup(old, "id"), new, "{old}");
        }
    }

    #[test]
    fn a_network_namespace_is_found_by_its_path() {
        let with =
            |network: Value| json!({"linux": {"namespaces": [{"type": "pid", "path": "/x"}, network]}});
        let named = with(json!({"type": "network", "path": "/run/netns/a"}));
        assert_eq!(network(&named), Some(Path::new("/run/netns/a")));
        for own in [
            with(json!({"type": "network"})),
            with(json!({"type": "network", "path": ""})),
            json!({}),
        ] {
            assert_eq!(network(&own), None, "{own}");
        }
        let own = with(json!({"type": "network"}));
        let change = Change {
            network: Some("/run/netns/b"),
            ..CHANGE
        };
        assert_eq!(
            network(&rewritten(&own, &change)),
            Some(Path::new("/run/netns/b"))
        );
        assert!(rewrite(&mut json!({"linux": {}}), &change).is_err());
    }

    #[test]
    fn what_is_no_specification_is_an_error() {
        for bad in [
            json!([]),
            json!({"annotations": 1}),
            json!({"linux": {"cgroupsPath": 1}}),
        ] {
            assert!(rewrite(&mut bad.clone(), &CHANGE).is_err(), "{bad}");
        }
    }
}
