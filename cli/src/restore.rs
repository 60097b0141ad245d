//! `bulkhead restore`: a new pod that goes on where a saved one was.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::snapshot::{Manifest, check_name};

use crate::begin::{self, Wanted};
use crate::records;

/// Options of `bulkhead restore`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Name of the snapshot
    name: String,
    /// Id of the new pod [default: the old one's with eight digits more]
    #[arg(long)]
    id: Option<String>,
    /// Append what each container prints to a file in this directory, <id>.log [default: nobody gets it]
    #[arg(long, value_name = "DIRECTORY")]
    log: Option<PathBuf>,
    /// Network namespace of the new pod [default: one of its own, without interfaces]
    #[arg(long, value_name = "PATH")]
    netns: Option<String>,
    /// containerd's socket [default: that of the containerd that had made the pod]
    #[arg(long, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Begins a pod from a snapshot and prints the ids of its containers, the one that stands for the pod first.
///
/// # Errors
/// There is no such snapshot, its pod cannot be made this way, or a step fails; nothing is left then.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let configuration =
        Configuration::load(arguments.config.as_deref()).context("Cannot load the configuration")?;
    let name = &arguments.name;
    check_name(name)?;
    let store = &configuration.snapshot_dir;
    let directory = store.join(name);
    let manifest = Manifest::read(store, &directory)?;
    let client = records::client(&manifest.origin, arguments.containerd.as_deref())?;
    let records = match records::kept(&directory)? {
        Some(records) => records,
        None => records::ask(&client, &manifest)
            .with_context(|| format!("Snapshot {name} has no record of its containers"))?,
    };
    let id = match &arguments.id {
        Some(id) => id.clone(),
        None => begin::new_id(&manifest.origin.pod)?,
    };
    let wanted = Wanted {
        snapshot: name,
        id: &id,
        network: arguments.netns.as_deref(),
        log: arguments.log.as_deref(),
    };
    let pod = begin::plan(&manifest, &records, &wanted)?;
    begin::begin(&client, &pod).with_context(|| format!("Cannot start pod {id} from snapshot {name}"))?;
    for planned in &pod {
        println!("{}", planned.container.id);
    }
    Ok(ExitCode::SUCCESS)
}
