//! `bulkhead snapshot`: saves a running pod, for pods that begin from there.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::snapshot::{ANNOTATION, Manifest, check_name};
use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use ttrpc::context::with_duration;

use crate::pods::{self, Pod};
use crate::{begin, records};

/// How long a pod may take to be saved: its disks are copied.
const LIMIT: Duration = Duration::from_secs(600);

/// Options of `bulkhead snapshot`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id of the pod, or as much of it as no other begins with
    pod: String,
    /// Name of the snapshot
    name: String,
    /// containerd's socket [default: that of the pod's containerd]
    #[arg(long, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Saves a pod, and keeps what containerd knows of its containers with it.
///
/// # Errors
/// There is no such pod, or it cannot be saved.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments {
        pod,
        name,
        containerd,
        config,
    } = arguments;
    let configuration = Configuration::load(config.as_deref()).context("Cannot load the configuration")?;
    check_name(name)?;
    let store = &configuration.snapshot_dir;
    let pod = pods::find(pod, &configuration.state_dir)?;
    let directory = store.join(name);
    save(&pod, &directory)?;
    let by_command = match keep_records(store, &directory, containerd.as_deref()) {
        Ok(by_command) => by_command,
        Err(error) => {
            // It is a snapshot all the same.
            eprintln!(
                "bulkhead: what containerd knows of the pod is not kept, so `bulkhead restore` needs the pod's containers \
                 to be there still: {error:#}"
            );
            true
        }
    };
    let command = if by_command {
        format!("by `bulkhead restore {name}` or ")
    } else {
        String::new()
    };
    println!(
        "pod {} is saved in {} ({} MiB); others begin from it {command}with the annotation {ANNOTATION}={name}",
        pod.id,
        directory.display(),
        used(&directory)? >> 20
    );
    Ok(ExitCode::SUCCESS)
}

/// Keeps what containerd knows of the pod's containers. Gives whether `bulkhead restore` can make others like them.
fn keep_records(store: &Path, directory: &Path, containerd: Option<&Path>) -> anyhow::Result<bool> {
    let manifest = Manifest::read(store, directory)?;
    let client = records::client(&manifest.origin, containerd)?;
    let records = records::ask(&client, &manifest)?;
    records::keep(directory, &records)?;
    let all = records.records.iter().map(|record| begin::refuse(record, true));
    Ok(all.collect::<anyhow::Result<()>>().is_ok())
}

/// Has a pod's shim save it in `directory`.
///
/// # Errors
/// What the shim says instead.
pub fn save(pod: &Pod, directory: &Path) -> anyhow::Result<()> {
    let Pod { id, address, .. } = pod;
    checkpoint(id, address, directory).with_context(|| format!("Cannot save pod {id}"))
}

fn checkpoint(id: &str, address: &str, directory: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot make the runtime")?;
    let request = CheckpointTaskRequest {
        id: id.to_owned(),
        path: directory.display().to_string(),
        ..CheckpointTaskRequest::default()
    };
    let answer = runtime.block_on(async {
        let client = TaskClient::new(Client::connect(address).await?);
        client.checkpoint(with_duration(LIMIT), &request).await
    });
    match answer {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) => Err(anyhow!(status.message)),
        Err(error) => Err(error).with_context(|| format!("The shim at {address} does not answer")),
    }
}

/// Bytes on the disk below a directory.
fn used(directory: &Path) -> anyhow::Result<u64> {
    let mut sum = 0;
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("Cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("Cannot read {}", directory.display()))?;
        let metadata = entry
            .metadata()
            .with_context(|| format!("Cannot look at {}", entry.path().display()))?;
        sum += if metadata.is_dir() {
            used(&entry.path())?
        } else {
            metadata.blocks() * 512
        };
    }
    Ok(sum)
}
