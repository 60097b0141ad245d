//! `cargo xtask bench`: what a start costs, beside the peers, in instructions.
//!
//! Everything is measured in the emulated host in its deterministic mode, where an instruction takes 2 ns of virtual
//! time. The ratios hold; the times are not those of any hardware. What is compared is measured in one machine.
//!
//! What is compared with what is data: `xtask/bench/rows.json`. A ratio that is worse than the one recorded in
//! `xtask/bench/ratios.json` by more than a twentieth fails the benchmark.

mod measure;
mod peers;
mod picture;
mod rows;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use self::measure::{Bench, Values};
use self::peers::Peers;
use self::rows::{Ratios, Rows};
use crate::cache;
use crate::cargo;
use crate::host::{ARTIFACT_STEPS, Artifacts, HOST_STEPS, Host};
use crate::progress::Progress;
use crate::workspace;

/// What is measured in one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Starts by `ctr`, of the VMM alone and of QEMU, and memory
    Containers,
    /// Starts of pods by containerd's CRI
    Pods,
    /// 1, 10 and 50 starts at the same time, and memory of as many
    Parallel,
    /// Work of a guest's filesystem, disk and network devices
    Io,
}

fn rows_file() -> PathBuf {
    workspace::path("xtask/bench/rows.json")
}

fn ratios_file() -> PathBuf {
    workspace::path("xtask/bench/ratios.json")
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Containers => "containers",
            Self::Pods => "pods",
            Self::Parallel => "parallel",
            Self::Io => "io",
        }
    }
}

/// Arguments of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// How often each start is repeated
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds after which a machine is stopped; one that was is repeated once
    #[arg(long, default_value_t = 1500)]
    timeout: u64,
    /// Only this part (repeatable)
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Files that a guest creates, looks at and removes: 10,000 take a quarter of an hour
    #[arg(long, default_value_t = 1000)]
    files: u32,
    /// Real time instead of counted instructions: quick, and good for no comparison
    #[arg(long)]
    real_time: bool,
    /// Write the ratios down as those that later ones are compared with, and draw docs/start.svg
    #[arg(long, conflicts_with = "real_time")]
    record: bool,
}

/// Runs the benchmark and prints its tables.
///
/// # Errors
/// Something cannot be built, a measurement fails, or a ratio is worse than the recorded one.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let mut parts = Part::value_variants().to_vec();
    parts.retain(|part| arguments.part.is_empty() || arguments.part.contains(part));
    let rows = Rows::load(&rows_file())?;
    let ratios = Ratios::load(&ratios_file(), &rows)?;
    let progress = Progress::new(ARTIFACT_STEPS + HOST_STEPS + 3);
    let artifacts = Artifacts::build(&progress)?;
    let host = Host::build(&progress)?;
    let peers = Peers::build(&progress)?;
    let mut programs = cargo::build(
        &progress,
        "boot program",
        &["build", "--release", "--package=bulkhead-vmm", "--example=boot"],
    )?;
    programs.extend(cargo::build(
        &progress,
        "program that starts pods",
        &["build", "--release", "--package=bulkhead-tests", "--bins"],
    )?);
    let out = cache::directory("bench")?.join(std::process::id().to_string());
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let bench = Bench {
        arguments,
        artifacts: &artifacts,
        programs: &programs,
        host: &host,
        peers: &peers,
        out: &out,
    };
    let (mut remarks, mut starts, mut values, mut failed) = (Vec::new(), Vec::new(), Values::new(), None);
    parts.retain(|part| match bench.measure(*part, &mut remarks, &mut starts) {
        Ok(more) => {
            values.extend(more);
            true
        }
        Err(error) => {
            failed.get_or_insert(error);
            false
        }
    });
    fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    // What was measured is shown, whatever became of the rest.
    if !parts.is_empty() {
        println!("\n{}", table::table(&rows, &parts, &values, &ratios)?);
    }
    for remark in remarks {
        println!("{remark}");
    }
    if arguments.record {
        ratios.record(&ratios_file(), &rows, &parts, &values)?;
        if !starts.is_empty() {
            let file = workspace::path("docs/start.svg");
            fs::write(&file, picture::draw(&starts))
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
    } else if !arguments.real_time {
        let verdict = ratios.judge(rows.of(&parts), &values)?;
        if !verdict.news.is_empty() {
            println!("To be recorded (--record):\n  {}", verdict.news.join("\n  "));
        }
        if !verdict.worse.is_empty() {
            println!("Worse than recorded:\n  {}", verdict.worse.join("\n  "));
        }
        if failed.is_none() {
            ensure!(verdict.worse.is_empty(), "ratios are worse than recorded");
        }
    }
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}
