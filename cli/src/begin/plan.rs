//! What containerd is to be asked for, from the records of a saved pod.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use bulkhead_containerd::api::{Any, Container, NewSnapshot, Record, Records, SnapshotKind};
use bulkhead_sandbox::snapshot::{ANNOTATION, Manifest, SavedContainer};
use serde_json::Value;

use super::spec::{self, Change};
use super::{Planned, Root};

/// Labels of containerd's CRI plugin begin so.
const CRI: &str = "io.cri-containerd.";

/// Labels that are one container's alone: nerdctl finds containers by them, and containerd starts those anew that have ended.
const OWN_LABELS: [&str; 2] = ["nerdctl/", "containerd.io/restart."];

/// Labels that tell a snapshotter how to make a root file system. Others say what has become of it.
const ROOT_LABELS: &str = "containerd.io/snapshot/";

/// Longest part of an old id in a new one: the id is the pod's host name, which has 64 bytes at most.
const LONGEST_BASE: usize = 40;

/// A pod that is to begin from a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The snapshot's name.
    pub snapshot: &'a str,
    /// The new pod's id.
    pub id: &'a str,
    /// Path of its network namespace; absent: it has one of its own.
    pub network: Option<&'a str>,
    /// Directory of the files that get its output; absent: nobody does.
    pub log: Option<&'a Path>,
}

/// The containers of the pod, the one that stands for it first.
///
/// # Errors
/// A record is missing, or [`refuse`]s.
pub fn plan(manifest: &Manifest, records: &Records, wanted: &Wanted<'_>) -> anyhow::Result<Vec<Planned>> {
    for record in &records.records {
        refuse(record, wanted.network.is_some())?;
    }
    let find = |id: &str| {
        let mut records = records.records.iter();
        records
            .find(|record| record.container.id == id)
            .with_context(|| format!("There is no record of container {id}, which the saved pod had"))
    };
    let pod = &manifest.origin.pod;
    let saved = &manifest.containers;
    if let [alone] = saved.as_slice()
        && alone.container == *pod
    {
        return Ok(vec![planned(find(pod)?, wanted, wanted.id, Some(alone))?]);
    }
    let mut containers = vec![planned(find(pod)?, wanted, wanted.id, None)?];
    for (number, saved) in saved.iter().enumerate() {
        let name = saved.name.clone().unwrap_or_else(|| number.to_string());
        let id = format!("{}-{name}", wanted.id);
        containers.push(planned(find(&saved.container)?, wanted, &id, Some(saved))?);
    }
    Ok(containers)
}

/// Refuses a container that another can take the place of only through CRI, which has to know its pods, or with another
/// network namespace, unless one `has_network`.
///
/// # Errors
/// Why, and what to do instead.
pub fn refuse(record: &Record, has_network: bool) -> anyhow::Result<()> {
    let container = &record.container;
    let id = &container.id;
    let is_cris = container.labels.keys().any(|label| label.starts_with(CRI));
    if is_cris || !container.sandbox.is_empty() {
        bail!(
            "Container {id} was made through CRI, which would not know the new pod: create the pod through CRI, with the \
             annotation {ANNOTATION}, which names the snapshot"
        );
    }
    let spec = specification(container)?;
    if let Some(path) = spec::network(&spec)
        && !has_network
    {
        bail!(
            "Container {id} is in the network namespace {}, which belongs to the old pod: give `bulkhead restore` another one \
             with --netns, or create the pod through CRI, with the annotation {ANNOTATION}, which names the snapshot",
            path.display()
        );
    }
    Ok(())
}

fn specification(container: &Container) -> anyhow::Result<Value> {
    serde_json::from_slice(&container.spec.value)
        .with_context(|| format!("The specification of container {} is not JSON", container.id))
}

/// The container that takes the place of a recorded one. `saved` is absent for the container that stands for a pod of several.
fn planned(
    record: &Record,
    wanted: &Wanted<'_>,
    id: &str,
    saved: Option<&SavedContainer>,
) -> anyhow::Result<Planned> {
    let mut container = record.container.clone().unwrap_or_default();
    let mut spec = specification(&container)?;
    let change = Change {
        id,
        pod: wanted.id,
        snapshot: (id == wanted.id).then_some(wanted.snapshot),
        network: wanted.network,
    };
    spec::rewrite(&mut spec, &change)
        .with_context(|| format!("The specification of container {} is not valid", container.id))?;
    container.spec = Some(Any {
        value: spec.to_string().into_bytes(),
        ..container.spec.take().unwrap_or_default()
    })
    .into();
    let mut root = None;
    if !container.snapshot_key.is_empty() {
        let made = record.root.as_ref();
        let made = made.with_context(|| format!("Container {} has no root file system", container.id))?;
        root = Some(Root {
            request: NewSnapshot {
                snapshotter: container.snapshotter.clone(),
                key: id.to_owned(),
                parent: made.parent.clone(),
                labels: labels(&made.labels, |label| label.starts_with(ROOT_LABELS)),
                ..NewSnapshot::default()
            },
            writable: made.kind.enum_value_or_default() != SnapshotKind::VIEW,
        });
        id.clone_into(&mut container.snapshot_key);
    }
    container.labels = labels(&container.labels, |label| {
        !OWN_LABELS.iter().any(|own| label.starts_with(own))
    });
    id.clone_into(&mut container.id);
    Ok(Planned {
        container,
        root,
        terminal: saved.is_some_and(|saved| saved.terminal),
        output: match (wanted.log, saved) {
            (Some(directory), Some(_)) => log(directory, id)?,
            _ => String::new(),
        },
    })
}

fn labels(all: &HashMap<String, String>, keep: impl Fn(&str) -> bool) -> HashMap<String, String> {
    let kept = all.iter().filter(|(label, _)| keep(label));
    kept.map(|(label, value)| (label.clone(), value.clone()))
        .collect()
}

/// URI of the file in `directory` for a container's output.
fn log(directory: &Path, id: &str) -> anyhow::Result<String> {
    let absolute = std::path::absolute(directory.join(format!("{id}.log")))
        .with_context(|| format!("Cannot tell where {} is", directory.display()))?;
    let mut uri = "file://".to_owned();
    for byte in absolute.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                uri.push(char::from(*byte));
            }
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(uri)
}

/// An id for a new pod, after the old one's.
///
/// # Errors
/// As [`suffix`].
pub fn new_id(old: &str) -> anyhow::Result<String> {
    let end = old
        .char_indices()
        .nth(LONGEST_BASE)
        .map_or(old.len(), |(end, _)| end);
    // An id's parts are not empty.
    let base = old[..end].trim_end_matches(|end: char| !end.is_ascii_alphanumeric());
    Ok(format!("{base}-{}", suffix()?))
}

/// Eight digits that are unlikely to come again.
///
/// # Errors
/// The host's generator cannot be read.
pub fn suffix() -> anyhow::Result<String> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("Cannot read /dev/urandom")?;
    Ok(format!("{:08x}", u32::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests;
