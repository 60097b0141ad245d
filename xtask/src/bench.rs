//! `cargo xtask bench`: what a start costs, beside the peers, in instructions.
//!
//! Everything is measured in the emulated host in its deterministic mode, where an instruction takes 2 ns of virtual
//! time. The ratios hold; the times are not those of any hardware. What is compared is measured in one machine.

mod measure;
mod table;

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use self::measure::{Bench, Values};
use crate::cache;
use crate::cargo;
use crate::host::{ARTIFACT_STEPS, Artifacts, HOST_STEPS, Host};
use crate::progress::Progress;

/// What is measured in one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Starts by `ctr`, of the VMM alone and of QEMU, and memory
    Containers,
    /// Starts of pods by containerd's CRI
    Pods,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Containers => "containers",
            Self::Pods => "pods",
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
    /// Real time instead of counted instructions: quick, and good for no comparison
    #[arg(long)]
    real_time: bool,
}

/// Runs the benchmark and prints its tables.
///
/// # Errors
/// Something cannot be built, or a measurement fails.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let mut parts = Part::value_variants().to_vec();
    parts.retain(|part| arguments.part.is_empty() || arguments.part.contains(part));
    let progress = Progress::new(ARTIFACT_STEPS + HOST_STEPS + 2);
    let artifacts = Artifacts::build(&progress)?;
    let host = Host::build(&progress)?;
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
        out: &out,
    };
    let (mut remarks, mut values, mut failed) = (Vec::new(), Values::new(), None);
    parts.retain(|part| match bench.measure(*part, &mut remarks) {
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
        println!("\n{}", table::table(&parts, &values)?);
    }
    for remark in remarks {
        println!("{remark}");
    }
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}
