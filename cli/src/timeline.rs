//! `bulkhead timeline`: where the time of a pod's start went.

mod chart;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::timeline::{FILE, Record};

use crate::pods;

/// Options of `bulkhead timeline`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id of the pod, or as much of it as no other begins with
    #[arg(required_unless_present = "file")]
    pod: Option<String>,
    /// Print the phases as JSON
    #[arg(long)]
    json: bool,
    /// Show a saved timeline instead of a pod's
    #[arg(long, value_name = "FILE", conflicts_with = "pod")]
    file: Option<PathBuf>,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Prints a timeline.
///
/// # Errors
/// There is no such pod, or its timeline cannot be read.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let path = match (&arguments.file, &arguments.pod) {
        (Some(file), _) => file.clone(),
        (None, Some(pod)) => {
            let configuration =
                Configuration::load(arguments.config.as_deref()).context("Cannot load the configuration")?;
            find(
                pod,
                &configuration.state_dir,
                configuration.timeline_dir.as_deref(),
            )?
        }
        (None, None) => bail!("No pod is named"),
    };
    let record = Record::read(&path)
        .with_context(|| format!("Cannot read the timeline {}", path.display()))?
        .context("The pod has not come far enough to save a timeline")?;
    let text = if arguments.json {
        chart::json(&record)
    } else {
        chart::text(&record)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("Cannot print the timeline")?;
    Ok(ExitCode::SUCCESS)
}

/// The timeline of the pod whose id is `pod` or, if there is one only, begins with it: of one that is there (in
/// `state_dir`), or of one that is gone (in `timeline_dir`).
fn find(pod: &str, state_dir: &Path, timeline_dir: Option<&Path>) -> anyhow::Result<PathBuf> {
    let mut found = pods::with_file(pod, state_dir, FILE)?;
    if let Some(directory) = timeline_dir {
        for name in pods::names(directory)? {
            if let Some(id) = name.strip_suffix(".json")
                && id.starts_with(pod)
                && found.iter().all(|(other, _)| other != id)
            {
                found.push((id.to_owned(), directory.join(&name)));
            }
        }
    }
    Ok(pods::choose(pod, found, state_dir)?.1)
}

#[cfg(test)]
mod tests;
