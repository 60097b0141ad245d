//! `cargo xtask test`: the integration tests with each containerd; beside them unit and property tests with nextest, format
//! and lints, a short run of each fuzz target, and the ratios of the benchmark.

mod conformance;
mod counts;
mod integration;
mod suites;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::counts::Counts;
use crate::cargo;
use crate::fuzz;
use crate::host::Containerd;
use crate::packages;
use crate::progress::Progress;
use crate::workspace;

/// Arguments of `cargo xtask test`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Only the unit and property tests, the format, the lints and the fuzz targets
    #[arg(long, conflicts_with = "integration")]
    unit: bool,
    /// Only the integration tests
    #[arg(long)]
    integration: bool,
    /// Only with this containerd
    #[arg(long, value_enum)]
    containerd: Option<Containerd>,
    /// Only these integration tests (repeatable)
    #[arg(long, value_enum)]
    suite: Vec<suites::Suite>,
    /// Install the programs as they were built last; the tests themselves are built
    #[arg(long)]
    no_build: bool,
    /// Every integration test with every containerd and both ways of making sandboxes, not only with the newest; takes an
    /// hour more
    #[arg(long)]
    everything: bool,
    /// Start as many pods and processes at once in the emulated host as on hardware; takes half an hour more
    #[arg(long)]
    crowds: bool,
    /// Every kind of fault at every step; takes a quarter of an hour more
    #[arg(long)]
    all_faults: bool,
    /// How many cycles the suite `soak` makes
    #[arg(long, default_value_t = 10)]
    cycles: u32,
    /// Memory of the emulated host in MiB, for as many pods at once as it holds
    #[arg(long)]
    memory: Option<u32>,
    /// Seconds that the integration tests with one containerd may take in the emulated host
    #[arg(long, default_value_t = integration::LIMIT.as_secs())]
    timeout: u64,
    /// Arguments of the integration tests: part of a name, `--skip NAME`
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Runs the tests. The last lines say which failed, and how many passed, failed and were skipped.
///
/// # Errors
/// Something cannot be built or started.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let progress = Progress::new(0);
    let counts = match (arguments.unit, arguments.integration) {
        (true, _) => checks(&progress)?,
        (_, true) => integration::run(&progress, arguments, || Ok(Counts::default()))?,
        _ => integration::run(&progress, arguments, || checks(&progress))?,
    };
    println!("{counts}");
    Ok(ExitCode::from(u8::from(counts.failed > 0 || counts.passed == 0)))
}

/// All that needs no machine of its own.
fn checks(progress: &Progress) -> Result<Counts> {
    progress.extend(4);
    let mut counts = unit(progress)?;
    counts += lint(progress, "format of the source (cargo fmt)", &["fmt", "--check"])?;
    let deny = ["--", "-D", "warnings"];
    let all = [&["clippy", "--workspace", "--all-targets"], &deny[..]].concat();
    counts += lint(progress, "lints (cargo clippy)", &all)?;
    // These have `test = false`, and that takes them out of all targets.
    let named = [
        &["clippy", "--workspace", "--test=integration", "--test=guest"],
        &deny[..],
    ]
    .concat();
    counts += lint(progress, "lints of the tests on a machine of their own", &named)?;
    counts += fuzz_targets(progress)?;
    Ok(counts)
}

fn unit(progress: &Progress) -> Result<Counts> {
    packages::ensure(packages::PROGRAMS)?;
    // Tests of the archives and of the root image run these tools.
    packages::ensure(packages::ROOTFS)?;
    packages::ensure(&["cpio"])?;
    ensure_nextest(progress)?;
    progress.step("unit and property tests", |_| {
        let mut nextest = cargo::in_background();
        nextest.args(["nextest", "run", "--workspace", "--no-fail-fast"]);
        if may_make_taps() {
            nextest.args(["--run-ignored", "all", "-E", EVERYWHERE]);
        } else {
            eprintln!("skipped: tests that need root and /dev/net/tun");
        }
        let mut child = nextest
            .current_dir(workspace::root())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run cargo nextest")?;
        let stderr = child.stderr.take().context("cargo nextest has no output")?;
        let counts = pass_on(stderr)?;
        let status = child.wait().context("cannot wait for cargo nextest")?;
        let counts = counts.with_context(|| format!("cargo nextest ended without a summary ({status})"))?;
        ensure!(
            status.success() || counts.failed > 0,
            "cargo nextest failed ({status}), though no test did"
        );
        Ok(counts)
    })
}

/// Runs each fuzz target for a moment, which counts as one test.
fn fuzz_targets(progress: &Progress) -> Result<Counts> {
    let targets = fuzz::targets()?;
    progress.extend(1 + targets.len());
    let programs = fuzz::build(progress)?;
    let mut counts = Counts::default();
    for target in &targets {
        let outcome = fuzz::run(progress, &programs, target, fuzz::TEST_SECONDS)?;
        eprintln!("{target}: {outcome}");
        counts += Counts::of(&format!("fuzz target {target}"), outcome.is_clean());
    }
    Ok(counts)
}

/// Runs one of cargo's checks of the source, which counts as one test.
fn lint(progress: &Progress, title: &str, arguments: &[&str]) -> Result<Counts> {
    if let Some(tool) = arguments.first()
        && !has(tool)
    {
        eprintln!("{title}: skipped, because cargo {tool} is missing (rustup component add rustfmt clippy)");
        return Ok(Counts {
            skipped: 1,
            ..Counts::default()
        });
    }
    progress.step(title, |_| {
        let status = cargo::in_background()
            .current_dir(workspace::root())
            .args(arguments)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot run cargo {}", arguments.join(" ")))?;
        Ok(Counts::of(title, status.success()))
    })
}

/// All but a test that needs modules of the kernel for traffic control, which few build machines have. The integration
/// tests of networks do the same in the emulated host.
const EVERYWHERE: &str = "not test(interfaces_are_followed_and_given_back)";

/// Whether the tests that need a real tap device can run.
fn may_make_taps() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    root && fs::exists("/dev/net/tun").unwrap_or(false)
}

/// Copies nextest's output line by line; the counts of its summary, after which it names what failed.
fn pass_on(stderr: impl Read) -> Result<Option<Counts>> {
    let mut counts: Option<Counts> = None;
    for line in BufReader::new(stderr).lines() {
        let line = line.context("cannot read nextest's output")?;
        eprintln!("{line}");
        match &mut counts {
            Some(counts) => counts.failures.extend(failure(&line)),
            None => counts = summary(&line),
        }
    }
    Ok(counts)
}

/// The test in nextest's line `FAIL [ 0.004s] (2/9) crate module::test`, or `TIMEOUT`, `SIGABRT`.
fn failure(line: &str) -> Option<String> {
    let (_, name) = line.split_once(']')?;
    let name = name.trim_start();
    let name = match name.strip_prefix('(') {
        Some(number) => number.split_once(')')?.1,
        None => name,
    };
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// The counts in nextest's line `Summary [ 2s] 9 tests run: 8 passed (1 slow), 1 failed, 3 skipped`.
fn summary(line: &str) -> Option<Counts> {
    let (_, text) = line.trim_start().strip_prefix("Summary")?.split_once("run:")?;
    let mut counts = Counts::default();
    for part in text.split(", ") {
        let mut words = part.split_whitespace();
        let (Some(number), Some(what)) = (
            words.next().and_then(|word| word.parse::<u64>().ok()),
            words.next(),
        ) else {
            continue;
        };
        match what {
            "passed" => counts.passed += number,
            "skipped" => counts.skipped += number,
            // failed, timed out, exec failed
            _ => counts.failed += number,
        }
    }
    Some(counts)
}

/// Whether cargo has this subcommand.
fn has(tool: &str) -> bool {
    let found = Command::new(cargo::program())
        .args([tool, "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    found.is_ok_and(|status| status.success())
}

fn ensure_nextest(progress: &Progress) -> Result<()> {
    if has("nextest") {
        return Ok(());
    }
    progress.extend(1);
    progress.step("cargo-nextest (installed once)", |_| {
        let status = Command::new(cargo::program())
            .args(["install", "cargo-nextest", "--locked"])
            .stdin(Stdio::null())
            .status()
            .context("cannot run cargo install")?;
        ensure!(status.success(), "cannot install cargo-nextest ({status})");
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    pub(super) fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts {
            passed,
            failed,
            skipped,
            failures: Vec::new(),
        }
    }

    #[test]
    fn failures_are_those_named_after_the_summary() {
        let text = "        FAIL [   0.011s] (1/9) some-crate a::b\n     Summary [   2.1s] 9 tests run: 8 passed, 1 failed, 0 skipped\n\
            \x20       FAIL [   0.011s] (1/9) some-crate a::b\n";
        let found = pass_on(text.as_bytes()).unwrap().unwrap();
        assert_eq!(
            (found.failed, found.failures),
            (1, vec!["some-crate a::b".to_owned()])
        );
    }

    #[test]
    fn a_summary_of_nextest_is_understood() {
        let line = "     Summary [   2.101s] 9 tests run: 6 passed (1 slow), 1 failed, 1 timed out, 1 exec failed, 3 skipped";
        assert_eq!(summary(line).unwrap(), counts(6, 3, 3));
        assert_eq!(
            summary("     Summary [ 0.1s] 2 tests run: 2 passed, 0 skipped").unwrap(),
            counts(2, 0, 0)
        );
        assert!(summary("        PASS [ 0.1s] summary 9 tests run: 1 passed").is_none());
    }
}
