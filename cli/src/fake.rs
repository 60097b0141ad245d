//! For tests: saved pods, and who answers calls in containerd's place.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use bulkhead_containerd::Client;
use bulkhead_containerd::api::{Mount, Mounts, NewSnapshot, NewTask, OneContainer, SnapshotKey, TaskId};
use bulkhead_containerd::grpc::{NOT_FOUND, Status};
use bulkhead_sandbox::snapshot::{Machine, Manifest, Origin, SavedContainer, SavedRoot};
use bulkhead_sandbox::template::Identity;
use protobuf::Message;

/// Calls so far: service and method, and what they are about.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<Vec<String>>>);

impl Calls {
    /// Those so far, which are forgotten.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A client whose calls get an answer of `answer`, by their note, or else an empty one; a snapshot has one mount that names it.
pub fn client(
    answer: impl Fn(&str) -> Result<Option<Vec<u8>>, Status> + Send + Sync + 'static,
) -> (Client, Calls) {
    let calls = Calls::default();
    let notes = calls.clone();
    let client = Client::through(move |method, message, _| {
        let note = note(method, &message);
        notes.0.lock().unwrap().push(note.clone());
        if let Some(given) = answer(&note)? {
            return Ok(given);
        }
        let mut mounts = Mounts::default();
        if note.starts_with("Snapshots/Prepare") || note.starts_with("Snapshots/View") {
            mounts.mounts.push(Mount {
                source: NewSnapshot::parse_from_bytes(&message).unwrap().key,
                ..Mount::default()
            });
        }
        Ok(mounts.write_to_bytes().unwrap())
    });
    (client, calls)
}

fn note(method: &str, message: &[u8]) -> String {
    let name = method.split_once("v1.").unwrap().1;
    let about = match name {
        "Containers/Create" => {
            let request = OneContainer::parse_from_bytes(message).unwrap();
            request.container.id.clone()
        }
        "Snapshots/Prepare" | "Snapshots/View" => {
            let request = NewSnapshot::parse_from_bytes(message).unwrap();
            format!("{} of {}", request.key, request.parent)
        }
        "Snapshots/Stat" | "Snapshots/Remove" => SnapshotKey::parse_from_bytes(message).unwrap().key,
        "Tasks/Create" => {
            let request = NewTask::parse_from_bytes(message).unwrap();
            let sources: Vec<_> = request.rootfs.iter().map(|mount| mount.source.as_str()).collect();
            format!("{} on {}", request.container_id, sources.join(","))
        }
        // The id is field 1 in all others.
        _ => TaskId::parse_from_bytes(message).unwrap().container_id,
    };
    format!("{name} {about}")
}

pub fn refusal(message: &str) -> Status {
    Status {
        code: 9,
        message: message.to_owned(),
    }
}

pub fn not_found() -> Status {
    Status {
        code: NOT_FOUND,
        message: "not found".to_owned(),
    }
}

/// A container of a saved pod.
pub fn saved(container: &str, name: Option<&str>, terminal: bool) -> SavedContainer {
    SavedContainer {
        id: format!("guest-{container}"),
        container: container.to_owned(),
        name: name.map(str::to_owned),
        terminal,
        streams: [false, true, true],
        execs: Vec::new(),
        root: SavedRoot::Overlay {
            lower: "/l".to_owned(),
            upper: "0.upper".into(),
        },
        volumes: Vec::new(),
    }
}

/// The manifest of a saved pod.
pub fn manifest(pod: &str, containers: Vec<SavedContainer>) -> Manifest {
    let machine = Machine {
        boot_vcpus: 1,
        vcpus: 1,
        online: 1,
        max_vcpus: 1,
        memory_mib: 128,
        added_mib: 0,
        hotplug_mib: 0,
        console: true,
        balloon: true,
        disk_slots: 0,
        net_slots: 0,
    };
    let origin = Origin {
        manager: "/c.sock".into(),
        namespace: "n".to_owned(),
        pod: pod.to_owned(),
    };
    let image = Identity::of("/".as_ref()).unwrap();
    Manifest::new(origin, "n".to_owned(), image, machine, containers)
}
