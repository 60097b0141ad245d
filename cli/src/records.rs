//! What containerd knows of the containers of a pod, kept beside the pod's snapshot: others can then begin from it after
//! the pod is gone.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bulkhead_containerd::Client;
use bulkhead_containerd::api::{ContainerId, Record, Records, SnapshotKey};
use bulkhead_containerd::grpc::NOT_FOUND;
use bulkhead_sandbox::snapshot::{Manifest, Origin};
use protobuf::Message;

/// File of a snapshot with the records, a protobuf message [`Records`].
const FILE: &str = "containerd.records";

/// The containerd of a pod, or the one at `socket`.
///
/// # Errors
/// Neither is known.
pub fn client(origin: &Origin, socket: Option<&Path>) -> anyhow::Result<Client> {
    let socket = socket.unwrap_or(&origin.manager);
    if socket.as_os_str().is_empty() {
        bail!(
            "Pod {} does not know its containerd; name the socket with --containerd",
            origin.pod
        );
    }
    Ok(Client::new(socket.into(), origin.namespace.clone()))
}

/// Asks for the records of a saved pod: the pod's own first, if it has one (with the Sandbox API no container stands for a
/// pod), then those of its containers in the order of the manifest.
///
/// # Errors
/// containerd gives no answer, or has no such containers: all of them are named.
pub fn ask(client: &Client, manifest: &Manifest) -> anyhow::Result<Records> {
    let containers = manifest.containers.iter().map(|saved| saved.container.as_str());
    let pod = manifest.origin.pod.as_str();
    let is_alone = containers.clone().any(|id| id == pod);
    let mut records = Records::default();
    let mut gone = Vec::new();
    for id in std::iter::once(pod).filter(|_| !is_alone).chain(containers) {
        match one(client, id)? {
            Some(record) => records.records.push(record),
            None => gone.push(id),
        }
    }
    if gone == [pod] && !is_alone {
        gone.clear();
    }
    if !gone.is_empty() {
        bail!(
            "containerd no longer has what the pod was made from: container {}",
            gone.join(", ")
        );
    }
    Ok(records)
}

/// The record of one container; `None`: containerd has none.
///
/// # Errors
/// containerd gives no answer, or has lost the root file system.
pub fn one(client: &Client, id: &str) -> anyhow::Result<Option<Record>> {
    let container = match client.container(&ContainerId {
        id: id.to_owned(),
        ..ContainerId::default()
    }) {
        Ok(answer) => answer.container.unwrap_or_default(),
        Err(status) if status.code == NOT_FOUND => return Ok(None),
        Err(status) => {
            return Err(status).with_context(|| format!("containerd does not tell of container {id}"));
        }
    };
    let mut record = Record::default();
    if !container.snapshot_key.is_empty() {
        let key = SnapshotKey {
            snapshotter: container.snapshotter.clone(),
            key: container.snapshot_key.clone(),
            ..SnapshotKey::default()
        };
        let answer = client
            .stat_snapshot(&key)
            .with_context(|| format!("containerd does not tell of the root file system of container {id}"))?;
        record.root = answer.info;
    }
    record.container = Some(container).into();
    Ok(Some(record))
}

/// Keeps the records in the directory of a snapshot. They hold the environment of processes, so they are their owner's alone.
///
/// # Errors
/// The file cannot be written.
pub fn keep(directory: &Path, records: &Records) -> anyhow::Result<()> {
    let path = directory.join(FILE);
    let failed = || format!("Cannot write {}", path.display());
    let bytes = records.write_to_bytes().with_context(failed)?;
    // By a rename: what is there is whole.
    let unfinished = directory.join(format!("{FILE}.new"));
    let mut options = OpenOptions::new();
    let opened = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished);
    let written = opened.and_then(|mut file| file.write_all(&bytes));
    written
        .and_then(|()| fs::rename(&unfinished, &path))
        .with_context(failed)
}

/// The records that were kept; `None`: there are none.
///
/// # Errors
/// They cannot be read.
pub fn kept(directory: &Path) -> anyhow::Result<Option<Records>> {
    let path = directory.join(FILE);
    let failed = |path: &PathBuf| format!("Cannot read {}", path.display());
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(
            Records::parse_from_bytes(&bytes).with_context(|| failed(&path))?,
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| failed(&path)),
    }
}

#[cfg(test)]
mod tests;
