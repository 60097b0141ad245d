//! `bulkhead snapshot`: saves a running pod, for pods that begin from there.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::snapshot::{ANNOTATION, check_name};
use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use ttrpc::context::with_duration;

use crate::pods;

/// How long a pod may take to be saved: its disks are copied.
const LIMIT: Duration = Duration::from_secs(600);

/// Options of `bulkhead snapshot`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id of the pod, or as much of it as no other begins with
    pod: String,
    /// Name of the snapshot
    name: String,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Saves a pod.
///
/// # Errors
/// There is no such pod, or it cannot be saved.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { pod, name, config } = arguments;
    let configuration = Configuration::load(config.as_deref()).context("Cannot load the configuration")?;
    check_name(name)?;
    let (id, address) = pods::find(pod, &configuration.state_dir)?;
    let directory = configuration.snapshot_dir.join(name);
    save(&id, &address, &directory).with_context(|| format!("Cannot save pod {id}"))?;
    println!(
        "pod {id} is saved in {} ({} MiB); others begin from it with the annotation {ANNOTATION}={name}",
        directory.display(),
        used(&directory)? >> 20
    );
    Ok(ExitCode::SUCCESS)
}

/// Has the shim at `address` save its pod.
fn save(id: &str, address: &str, directory: &Path) -> anyhow::Result<()> {
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
