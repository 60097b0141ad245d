//! Requests to the agent, from their bytes to what it would do.
//!
//! The first byte says which request the others are. A finding is also a plan that mounts outside the agent's own
//! directory, a partition number that stays taken after a refusal, and a volume or id that is a path.

#![no_main]

use std::path::{Component, Path};

use bulkhead_agent::container::spec::{valid_id, valid_path};
use bulkhead_agent::network;
use bulkhead_agent::resume::Resume;
use bulkhead_agent::storage::volumes::{Create, Remove, VOLUMES, Version};
use bulkhead_agent::storage::{Partitions, Plan, RUN};
use bulkhead_fuzz::pod::check_settings;
use bulkhead_protocol::agent::{
    CommitVolumeRequest, ConfigureNetworkRequest, CreateContainerRequest, CreateVolumeRequest, FreezeRequest,
    ReattachStreamsRequest, RemoveVolumeRequest, ResumeRequest, StageVolumeRequest, UpdateContainerRequest,
};
use libfuzzer_sys::fuzz_target;
use protobuf::Message;

/// A message, which is the same when it is sent on.
fn message<T: Message + std::fmt::Debug>(data: &[u8]) -> Option<T> {
    let message = T::parse_from_bytes(data).ok()?;
    let again = message.write_to_bytes().expect("it was read");
    // Not byte by byte: maps have no order.
    assert_eq!(T::parse_from_bytes(&again).expect("it was written"), message);
    Some(message)
}

fn inside(path: &Path, directory: &str) -> bool {
    path.starts_with(directory) && path.components().all(|part| part != Component::ParentDir)
}

fn create(request: &CreateContainerRequest) {
    let id = &request.container_id;
    if !valid_id(id) {
        return;
    }
    let directory = Path::new(RUN).join("containers").join(id);
    assert_eq!(directory.parent(), Some(Path::new("/run/bulkhead/containers")));
    let mut partitions = Partitions::default();
    let plan = Plan::new(
        &directory,
        request.root.get_or_default(),
        &request.disk_mounts,
        &request.block_devices,
        &mut partitions,
    );
    let Ok(plan) = plan else {
        assert!(partitions.is_empty(), "numbers stay taken");
        return;
    };
    assert!(inside(&plan.root(), RUN), "root at {}", plan.root().display());
    for volume in plan.all() {
        assert!(
            inside(&volume.mount_point, RUN),
            "{}",
            volume.mount_point.display()
        );
        assert!(volume.mount_point != Path::new(RUN));
    }
    partitions.release(&plan);
    assert!(partitions.is_empty(), "numbers stay taken");
}

fn resume(request: &ResumeRequest) {
    if Resume::new(request).is_err() {
        return;
    }
    assert!(request.entropy.len() >= 32, "resumed without entropy");
    assert!(request.hostname.len() <= 64 && !request.hostname.contains('/'));
    assert!(request.machine_id.is_empty() || request.machine_id.len() == 32);
    for name in request.files.keys() {
        let path = Path::new(RUN).join(name);
        assert_eq!(path.parent(), Some(Path::new(RUN)), "{}", path.display());
        assert!(inside(&path, RUN));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 10 {
        0 => {
            if let Some(request) = message::<CreateContainerRequest>(data) {
                create(&request);
            }
        }
        1 => {
            if let Some(request) = message::<ConfigureNetworkRequest>(data) {
                let _ = network::rehearse(&request);
            }
        }
        2 => {
            if let Some(request) = message::<CreateVolumeRequest>(data) {
                let _ = Create::new(&request).map(|create| {
                    let point = create.point();
                    assert_eq!(point.parent(), Some(Path::new(VOLUMES)), "{}", point.display());
                });
            }
        }
        3 => {
            if let Some(request) = message::<StageVolumeRequest>(data) {
                let _ = Version::new(&request.name, &request.version);
                if valid_path(&request.source) {
                    assert!(inside(Path::new(&request.source), "/"));
                }
            }
        }
        4 => {
            if let Some(request) = message::<CommitVolumeRequest>(data) {
                let _ = Version::new(&request.name, &request.version);
            }
        }
        5 => {
            if let Some(request) = message::<RemoveVolumeRequest>(data) {
                let _ = Remove::new(&request.name);
            }
        }
        6 => {
            if let Some(request) = message::<ResumeRequest>(data) {
                resume(&request);
            }
        }
        7 => {
            // What they name is looked up, what they say is compared with constants.
            let _ = message::<ReattachStreamsRequest>(data);
        }
        8 => {
            let _ = message::<FreezeRequest>(data);
        }
        _ => {
            if let Some(request) = message::<UpdateContainerRequest>(data)
                && let Ok(resources) = serde_json::from_slice(&request.resources_json)
            {
                check_settings(&resources);
            }
        }
    }
});
