//! `cargo xtask demo`: containers in virtual machines, started by a containerd of the demo's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::cache;
use crate::cargo;
use crate::here;
use crate::host::{ARTIFACT_STEPS, Artifacts, Base, Containerd, HOST_STEPS, Host, Outcome, Run};
use crate::image;
use crate::kvm::{self, Place};
use crate::progress::Progress;
use crate::workspace;

/// Wall time for everything in the emulated host.
const LIMIT: Duration = Duration::from_secs(600);

/// Where the image of `--image` is in the emulated host.
const OWN_IMAGE: &str = "/opt/images/own.tar";

/// Names of phases in the timeline that are worth more than their identifier.
const PHASES: [(&str, &str); 13] = [
    ("shim_start", "shim started"),
    ("shim_ready", "shim ready"),
    ("create_called", "containerd asks for the container"),
    ("vmm_spawned", "VMM process started"),
    ("vmm_memory", "guest memory mapped"),
    ("vmm_kernel_loaded", "kernel loaded"),
    ("vmm_devices", "devices ready"),
    ("vm_running", "virtual machine runs"),
    ("agent_main", "kernel has booted, agent runs"),
    ("agent_ready", "agent ready"),
    ("sandbox_ready", "sandbox ready"),
    ("container_created", "container created"),
    ("first_output", "first output"),
];

/// Arguments of `cargo xtask demo`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Archive of an image (OCI layout or `docker save`) to run instead of busybox
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Run the programs as they were built last
    #[arg(long)]
    no_build: bool,
}

/// Runs the demo. The result is the container's exit code.
///
/// # Errors
/// Something cannot be built or started.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(image) = &arguments.image {
        ensure!(image.is_file(), "{} is not a file", image.display());
    }
    let progress = Progress::new(ARTIFACT_STEPS + HOST_STEPS);
    let artifacts = if arguments.no_build {
        Artifacts::of(&progress, &cargo::built()?)?
    } else {
        Artifacts::build(&progress)?
    };
    let place = kvm::choose(&artifacts.cli)?;
    let out = cache::directory("demo")?.join(std::process::id().to_string());
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let image = arguments.image.as_deref();
    let code = match place {
        Place::Here => here(&progress, &artifacts, image, &out),
        Place::Emulated => emulated(&progress, &artifacts, image, &out),
    };
    let timeline = fs::read(out.join("timeline/demo-uname.json"));
    fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    let code = code?;
    if let Ok(timeline) = timeline {
        let timeline = serde_json::from_slice(&timeline).context("cannot read the timeline")?;
        println!("\n{}", table(&timeline));
        if place == Place::Emulated {
            println!("Times of the emulated host are not those of hardware.");
        }
    }
    Ok(ExitCode::from(code))
}

fn emulated(progress: &Progress, artifacts: &Artifacts, image: Option<&Path>, out: &Path) -> Result<u8> {
    let host = Host::build(progress)?;
    let config = out.join("config.json");
    fs::write(&config, json!({"timeline_dir": "/out/timeline"}).to_string())
        .context("cannot write a file")?;
    let mut run = Run::new(["with-containerd", "/opt/demo"].map(Into::into).into());
    run.timeout = LIMIT;
    run.out = Some(out.to_owned());
    run.files = vec![
        ("/opt/demo".to_owned(), workspace::path("tests/host/demo")),
        ("/opt/demo.json".to_owned(), config),
    ];
    run.environment = vec![("BULKHEAD_CONFIG".to_owned(), "/opt/demo.json".to_owned())];
    if let Some(image) = image {
        run.files.push((OWN_IMAGE.to_owned(), image.to_owned()));
        run.environment
            .push(("BULKHEAD_IMAGE".to_owned(), OWN_IMAGE.to_owned()));
    }
    eprintln!("starting the emulated host (about half a minute)");
    match run.start(&host, Some(artifacts))? {
        Outcome::Exited(code) => Ok(code),
        Outcome::TimedOut => anyhow::bail!("the emulated host was stopped after {} s", LIMIT.as_secs()),
    }
}

fn here(progress: &Progress, artifacts: &Artifacts, image: Option<&Path>, out: &Path) -> Result<u8> {
    let base = Base::build(progress)?;
    let image = match image {
        Some(image) => image.to_owned(),
        None => image::busybox(&base.busybox())?,
    };
    let config = out.join("config.json");
    let settings = json!({"timeline_dir": out.join("timeline")});
    fs::write(&config, settings.to_string()).context("cannot write a file")?;
    let status = here::command(&base, artifacts, Containerd::V2_1)?
        .arg(workspace::path("tests/host/with-containerd"))
        .arg(workspace::path("tests/host/demo"))
        .env("BULKHEAD_CONFIG", config)
        .env(
            "BULKHEAD_IMAGE",
            image.canonicalize().context("cannot resolve the image's path")?,
        )
        .stdin(Stdio::null())
        .status()
        .context("cannot run with-containerd")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// The marks of a timeline, each with the time since the first and since the one before.
fn table(timeline: &Value) -> String {
    let marks = timeline["marks"].as_array().map_or(&[][..], Vec::as_slice);
    let time = |mark: &Value| mark["monotonic_us"].as_u64().unwrap_or(0);
    let start = marks.first().map_or(0, time);
    let mut before = start;
    let mut text = format!("{:>10}  {:>10}  phase\n", "ms", "+ms");
    for mark in marks {
        let now = time(mark);
        let phase = mark["phase"].as_str().unwrap_or("?");
        let name = PHASES
            .iter()
            .find(|(identifier, _)| *identifier == phase)
            .map_or_else(|| phase.replace('_', " "), |(_, name)| (*name).to_owned());
        text += &format!(
            "{:>10}  {:>10}  {name}\n",
            milliseconds(now.saturating_sub(start)),
            milliseconds(now.saturating_sub(before))
        );
        before = now;
    }
    text
}

fn milliseconds(microseconds: u64) -> String {
    format!("{}.{}", microseconds / 1000, microseconds % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::table;

    #[test]
    fn a_timeline_is_shown_from_its_start() {
        let timeline = json!({"sandbox": "x", "marks": [
            {"phase": "shim_start", "monotonic_us": 1_000_000},
            {"phase": "some_step", "monotonic_us": 1_002_500},
            {"phase": "first_output", "monotonic_us": 1_112_600},
        ]});
        let expected = [
            "        ms         +ms  phase",
            "       0.0         0.0  shim started",
            "       2.5         2.5  some step",
            "     112.6       110.1  first output",
            "",
        ];
        assert_eq!(table(&timeline), expected.join("\n"));
    }
}
