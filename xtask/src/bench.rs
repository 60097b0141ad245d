//! `cargo xtask bench`: what a start costs, beside the peers, in instructions.
//!
//! Everything is measured in one run of the emulated host in its deterministic mode, where an instruction takes 2 ns of
//! virtual time. The ratios hold; the times are not those of any hardware.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::cache;
use crate::cargo;
use crate::host::{ARTIFACT_STEPS, Artifacts, HOST_STEPS, Host, Outcome, Run};
use crate::progress::Progress;
use crate::workspace;

/// Arguments of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// How often each start is repeated
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds after which the machine is stopped
    #[arg(long, default_value_t = 1500)]
    timeout: u64,
    /// Real time instead of counted instructions: quick, and good for no comparison
    #[arg(long)]
    real_time: bool,
}

/// Values of one name, in the order in which they were measured.
type Values = BTreeMap<String, Vec<u64>>;

/// Runs the benchmark and prints its table.
///
/// # Errors
/// Something cannot be built, or a measurement fails.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let progress = Progress::new(ARTIFACT_STEPS + HOST_STEPS + 1);
    let artifacts = Artifacts::build(&progress)?;
    let host = Host::build(&progress)?;
    let programs = cargo::build(
        &progress,
        "boot program",
        &["build", "--release", "--package=bulkhead-vmm", "--example=boot"],
    )?;
    let out = cache::directory("bench")?.join(std::process::id().to_string());
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let result = measure(arguments, &artifacts, programs.get("boot")?, &host, &out);
    fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    println!("\n{}", table(&result?)?);
    Ok(ExitCode::SUCCESS)
}

fn measure(
    arguments: &Arguments,
    artifacts: &Artifacts,
    boot: &Path,
    host: &Host,
    out: &Path,
) -> Result<Values> {
    let transcript = out.join("transcript");
    let files = out.join("files");
    let mut run = Run::new(["with-containerd", "/opt/bench"].map(Into::into).into());
    run.deterministic = !arguments.real_time;
    run.timeout = Duration::from_secs(arguments.timeout);
    run.out = Some(files.clone());
    run.transcript = Some(transcript.clone());
    run.files = vec![
        ("/opt/bench".to_owned(), workspace::path("tests/host/bench")),
        ("/opt/boot".to_owned(), boot.to_owned()),
    ];
    // QEMU as a peer, in the host: of the same release as the host's root.
    run.trees = vec![host.machine.qemu_tree()];
    run.environment = vec![("BENCH_ROUNDS".to_owned(), arguments.rounds.to_string())];
    match run.start(host, Some(artifacts))? {
        Outcome::Exited(0) => {}
        Outcome::Exited(code) => bail!("the benchmark ended with exit code {code}"),
        Outcome::TimedOut => bail!("the benchmark was stopped after {} s", arguments.timeout),
    }
    let text = fs::read_to_string(&transcript).context("cannot read the benchmark's output")?;
    let mut values = parse(&text)?;
    for timeline in timelines(&files.join("timeline"))? {
        values
            .entry("ours_agent_ready".to_owned())
            .or_default()
            .push(span(&timeline, "vmm_main", "agent_answered")?);
    }
    Ok(values)
}

/// Reads the lines `bench NAME NUMBER`.
fn parse(text: &str) -> Result<Values> {
    let mut values = Values::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("bench ")) {
        let (name, number) = line
            .split_once(' ')
            .with_context(|| format!("malformed line: {line}"))?;
        let number = number
            .trim()
            .parse()
            .with_context(|| format!("malformed number: {line}"))?;
        values.entry(name.to_owned()).or_default().push(number);
    }
    Ok(values)
}

fn timelines(directory: &Path) -> Result<Vec<Value>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .context("the benchmark left no timelines")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    // Idle pods are there for their memory; their starts run into each other.
    paths.retain(|path| {
        !path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("idle"))
    });
    paths.sort();
    ensure!(!paths.is_empty(), "the benchmark left no timelines");
    paths
        .iter()
        .map(|path| {
            let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", path.display()))
        })
        .collect()
}

/// Microseconds between two marks of a timeline.
fn span(timeline: &Value, from: &str, to: &str) -> Result<u64> {
    let marks = timeline["marks"].as_array().map_or(&[][..], Vec::as_slice);
    let time = |phase: &str| {
        marks
            .iter()
            .find(|mark| mark["phase"] == phase)
            .and_then(|mark| mark["monotonic_us"].as_u64())
            .with_context(|| format!("the timeline has no mark {phase}"))
    };
    Ok(time(to)?.saturating_sub(time(from)?))
}

/// A row: what it is, our value, the peer's name and value.
struct Row(&'static str, &'static str, &'static str, &'static str);

const STARTS: [Row; 3] = [
    Row("`ctr run` to first output", "ours_run", "runc", "runc_run"),
    Row(
        "VMM process start to the agent's connection (peer: to init's first line)",
        "ours_boot",
        "QEMU microvm",
        "qemu_boot",
    ),
    Row(
        "the same in `ctr run`, VMM's main to the agent's first answer",
        "ours_agent_ready",
        "QEMU microvm",
        "qemu_boot",
    ),
];

fn table(values: &Values) -> Result<String> {
    let get = |name: &str| {
        values
            .get(name)
            .map(Vec::as_slice)
            .with_context(|| format!("{name} was not measured"))
    };
    let mut text =
        String::from("| start, virtual ms (median; all) | Bulkhead | peer | ratio |\n|---|---|---|---|\n");
    for Row(what, ours, peer, theirs) in STARTS {
        let (ours, theirs) = (get(ours)?, get(theirs)?);
        let ratio = median(ours) as f64 / median(theirs) as f64;
        text += &format!(
            "| {what} | {} | {peer} {} | {ratio:.2} |\n",
            milliseconds(ours),
            milliseconds(theirs)
        );
    }
    let sum =
        |names: [&str; 2]| -> Result<(u64, u64)> { Ok((median(get(names[0])?), median(get(names[1])?))) };
    let (shim, vmm) = sum(["ours_shim_pss", "ours_vmm_pss"])?;
    let (runc_shim, process) = sum(["runc_shim_pss", "runc_process_pss"])?;
    text +=
        "\n| memory of an idle pod, PSS in MiB, two running | Bulkhead | runc | ratio |\n|---|---|---|---|\n";
    text += &format!(
        "| shim + VMM with guest (runc: shim + process) | {} + {} = {} | {} + {} = {} | {:.2} |",
        mebibytes(shim),
        mebibytes(vmm),
        mebibytes(shim + vmm),
        mebibytes(runc_shim),
        mebibytes(process),
        mebibytes(runc_shim + process),
        (shim + vmm) as f64 / (runc_shim + process) as f64
    );
    Ok(text)
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

fn milliseconds(microseconds: &[u64]) -> String {
    let one = |value: u64| format!("{:.1}", value as f64 / 1000.0);
    let all: Vec<String> = microseconds.iter().map(|value| one(*value)).collect();
    format!("{} ({})", one(median(microseconds)), all.join(", "))
}

fn mebibytes(kibibytes: u64) -> String {
    format!("{:.1}", kibibytes as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn lines_become_a_table() {
        let text = "noise\nbench ours_run 600000\nbench ours_run 500000\nbench ours_run 520000\nbench runc_run 400000\n\
                    bench qemu_boot 200000\nbench ours_agent_ready 100000\nbench ours_boot 100000\nbench ours_shim_pss 1024\n\
                    bench ours_vmm_pss 9216\nbench runc_shim_pss 10240\nbench runc_process_pss 0\n";
        let table = table(&parse(text).unwrap()).unwrap();
        assert!(
            table.contains("| 520.0 (600.0, 500.0, 520.0) | runc 400.0 (400.0) | 1.30 |"),
            "{table}"
        );
        assert!(table.contains("| 0.50 |"), "{table}");
        assert!(
            table.contains("1.0 + 9.0 = 10.0 | 10.0 + 0.0 = 10.0 | 1.00 |"),
            "{table}"
        );
    }

    #[test]
    fn a_missing_value_is_named() {
        assert!(
            table(&Values::new())
                .unwrap_err()
                .to_string()
                .contains("ours_run")
        );
        assert!(parse("bench x y").is_err());
        let timeline = json!({"marks": [{"phase": "vmm_main", "monotonic_us": 5}]});
        assert!(
            span(&timeline, "vmm_main", "agent_answered")
                .unwrap_err()
                .to_string()
                .contains("agent_answered")
        );
    }
}
