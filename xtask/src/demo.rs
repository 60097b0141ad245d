//! `cargo xtask demo`: containers in virtual machines, started by a containerd of the demo's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

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
    let timeline = out.join("timeline/demo-uname.json");
    let shown = timeline.exists().then(|| show(&artifacts, &timeline));
    fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    let code = code?;
    shown.transpose()?;
    if place == Place::Emulated {
        println!("Times of the emulated host are not those of hardware.");
    }
    Ok(ExitCode::from(code))
}

/// Prints a timeline as `bulkhead timeline` does.
fn show(artifacts: &Artifacts, timeline: &Path) -> Result<()> {
    println!();
    let status = Command::new(&artifacts.cli)
        .args(["timeline", "--file"])
        .arg(timeline)
        .status()
        .with_context(|| format!("cannot run {}", artifacts.cli.display()))?;
    ensure!(status.success(), "the timeline cannot be shown ({status})");
    Ok(())
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
