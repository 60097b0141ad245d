#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;

use bulkhead_containerd::api::{Container, OneContainer, OneSnapshot, Snapshot};
use bulkhead_containerd::grpc::Status;

use super::*;
use crate::fake::{self, not_found, refusal};

/// The manifest of a pod with these containers.
fn manifest(pod: &str, containers: &[&str]) -> Manifest {
    let containers = containers.iter().map(|id| fake::saved(id, None, false));
    fake::manifest(pod, containers.collect())
}

/// containerd's answer about a container, or a root file system, of this note.
fn known(note: &str, containers: &[&str]) -> Result<Option<Vec<u8>>, Status> {
    let (call, id) = note.split_once(' ').unwrap();
    let answer = match call {
        "Containers/Get" if containers.contains(&id) => OneContainer {
            container: Some(Container {
                id: id.to_owned(),
                snapshot_key: if id == "pod" {
                    String::new()
                } else {
                    format!("{id}-key")
                },
                ..Container::default()
            })
            .into(),
            ..OneContainer::default()
        }
        .write_to_bytes(),
        "Snapshots/Stat" => OneSnapshot {
            info: Some(Snapshot {
                parent: format!("layers of {id}"),
                ..Snapshot::default()
            })
            .into(),
            ..OneSnapshot::default()
        }
        .write_to_bytes(),
        _ => return Err(not_found()),
    };
    Ok(Some(answer.unwrap()))
}

/// Ids in the records of a pod, or why there are none.
fn asked(manifest: &Manifest, containers: &'static [&str]) -> Result<Vec<String>, String> {
    let (client, _) = fake::client(|note| known(note, containers));
    match ask(&client, manifest) {
        Ok(records) => Ok(records
            .records
            .iter()
            .map(|record| format!("{} {}", record.container.id, record.root.parent))
            .collect()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_pod_is_recorded_with_its_containers() {
    let pod = manifest("pod", &["b", "a"]);
    let all = ["pod ", "b layers of b-key", "a layers of a-key"];
    assert_eq!(asked(&pod, &["a", "b", "pod"]).unwrap(), all);
    // With the Sandbox API.
    assert_eq!(asked(&pod, &["a", "b"]).unwrap(), all[1..]);
    let alone = manifest("a", &["a"]);
    assert_eq!(asked(&alone, &["a"]).unwrap(), ["a layers of a-key"]);
}

#[test]
fn everything_that_is_gone_is_named() {
    let pod = manifest("pod", &["b", "a"]);
    let error = asked(&pod, &["b"]).unwrap_err();
    assert!(error.ends_with("container pod, a"), "{error}");
    let error = asked(&manifest("a", &["a"]), &[]).unwrap_err();
    assert!(error.ends_with("container a"), "{error}");
    let (client, _) = fake::client(|_| Err(refusal("busy")));
    let error = format!("{:#}", one(&client, "a").unwrap_err());
    assert_eq!(error, "containerd does not tell of container a: code 9: busy");
}

#[test]
fn records_are_kept_for_their_owner() {
    let directory = std::env::temp_dir().join(format!("bulkhead-cli-records-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    assert!(kept(&directory).unwrap().is_none());
    let (client, _) = fake::client(|note| known(note, &["a"]));
    let records = ask(&client, &manifest("a", &["a"])).unwrap();
    keep(&directory, &records).unwrap();
    keep(&directory, &records).unwrap();
    assert_eq!(kept(&directory).unwrap().unwrap(), records);
    let mode = fs::metadata(directory.join(FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    fs::write(directory.join(FILE), [0xff; 9]).unwrap();
    let error = kept(&directory).unwrap_err().to_string();
    assert!(error.contains(FILE), "{error}");
    fs::remove_dir_all(&directory).unwrap();
    assert!(keep(&directory, &records).is_err());
}

#[test]
fn a_containerd_that_is_not_known_has_to_be_named() {
    let nobody = Origin::default();
    let error = client(&nobody, None).unwrap_err().to_string();
    assert!(error.contains("--containerd"), "{error}");
    assert!(client(&nobody, Some("/c.sock".as_ref())).is_ok());
}
