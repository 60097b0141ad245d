//! `bulkhead fork`: new pods that go on where a running one is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, bail};
use bulkhead_containerd::Client;
use bulkhead_containerd::api::Records;
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::snapshot::Manifest;

use crate::begin::{self, Wanted};
use crate::{pods, records, snapshot};

/// Most pods that begin at the same time.
const AT_ONCE: usize = 16;

/// Options of `bulkhead fork`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id of the pod, or as much of it as no other begins with
    pod: String,
    /// How many new pods
    #[arg(default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    count: u16,
    /// Append what each container prints to a file in this directory, <id>.log [default: nobody gets it]
    #[arg(long, value_name = "DIRECTORY")]
    log: Option<PathBuf>,
    /// containerd's socket [default: that of the pod's containerd]
    #[arg(long, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Saves the pod, begins others from there and prints their ids.
///
/// # Errors
/// The pod cannot be saved or made this way, or some of the others did not start: each is named, and those that did start
/// stay.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let configuration =
        Configuration::load(arguments.config.as_deref()).context("Cannot load the configuration")?;
    let pod = pods::find(&arguments.pod, &configuration.state_dir)?;
    let client = records::client(&pod.origin()?, arguments.containerd.as_deref())?;
    // Before the pod is stopped for nothing.
    if let Some(record) = records::one(&client, &pod.id)? {
        begin::refuse(&record, false)?;
    }
    let store = &configuration.snapshot_dir;
    let name = format!("fork-{}", begin::suffix()?);
    let temporary = Temporary(store.join(&name));
    snapshot::save(&pod, &temporary.0)?;
    let manifest = Manifest::read(store, &temporary.0)?;
    let records = records::ask(&client, &manifest)?;
    // With the Sandbox API the pod has no record, but its containers do.
    for record in &records.records {
        begin::refuse(record, false)?;
    }
    let ids = (0..arguments.count)
        .map(|_| begin::new_id(&pod.id))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let failed = at_once(&ids, |id| {
        let log = arguments.log.as_deref();
        start(&client, &manifest, &records, &name, id, log)
    });
    for id in &ids {
        if failed.iter().all(|(other, _)| other != id) {
            println!("{id}");
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let reasons: Vec<_> = failed
        .iter()
        .map(|(id, error)| format!("{id}: {error:#}"))
        .collect();
    bail!(
        "{} of {} forks of pod {} did not start:\n{}",
        failed.len(),
        ids.len(),
        pod.id,
        reasons.join("\n")
    )
}

fn start(
    client: &Client,
    manifest: &Manifest,
    records: &Records,
    snapshot: &str,
    id: &str,
    log: Option<&Path>,
) -> anyhow::Result<()> {
    let wanted = Wanted {
        snapshot,
        id,
        network: None,
        log,
    };
    begin::begin(client, &begin::plan(manifest, records, &wanted)?)
}

/// Runs `action` for each id, for several at the same time; gives those for which it failed, in their order.
fn at_once(
    ids: &[String],
    action: impl Fn(&str) -> anyhow::Result<()> + Sync,
) -> Vec<(String, anyhow::Error)> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..ids.len().min(AT_ONCE) {
            scope.spawn(|| {
                while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = action(id) {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push((id.clone(), error));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_by_key(|(id, _)| ids.iter().position(|other| other == id));
    failed
}

/// The snapshot that the forks begin from. Once they run they have mapped its memory and copied the rest, so that it can go.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("bulkhead: cannot remove {}: {error}", self.0.display());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Barrier;

    use super::*;

    #[test]
    fn forks_begin_at_the_same_time_and_those_that_fail_are_told_in_order() {
        let ids: Vec<_> = (0..AT_ONCE).map(|number| number.to_string()).collect();
        // Nobody passes before all are there.
        let all = Barrier::new(AT_ONCE);
        let failed = at_once(&ids, |id| {
            all.wait();
            if id == "3" || id == "11" {
                bail!("no {id}");
            }
            Ok(())
        });
        let told: Vec<_> = failed
            .iter()
            .map(|(id, error)| format!("{id}: {error}"))
            .collect();
        assert_eq!(told, ["3: no 3", "11: no 11"]);
    }

    #[test]
    fn more_than_fit_at_once_come_one_after_the_other() {
        let ids: Vec<_> = (0..3 * AT_ONCE).map(|number| number.to_string()).collect();
        let seen = Mutex::new(Vec::new());
        let failed = at_once(&ids, |id| {
            seen.lock().unwrap().push(id.to_owned());
            Ok(())
        });
        assert!(failed.is_empty());
        let mut seen = seen.into_inner().unwrap();
        seen.sort_by_key(|id| id.parse::<usize>().unwrap());
        assert_eq!(seen, ids);
    }

    #[test]
    fn the_snapshot_goes_with_the_command() {
        let directory = std::env::temp_dir().join(format!("bulkhead-cli-fork-{}", std::process::id()));
        fs::create_dir_all(directory.join("0.upper")).unwrap();
        fs::write(directory.join("memory"), "m").unwrap();
        drop(Temporary(directory.clone()));
        assert!(!directory.exists());
        drop(Temporary(directory));
    }
}
