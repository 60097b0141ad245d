//! `cargo xtask test`: unit and property tests with nextest, then the integration tests with each containerd.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::ops::AddAssign;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::cargo::{self, Programs};
use crate::here;
use crate::host::{ARTIFACT_STEPS, Artifacts, Base, Containerd, HOST_STEPS, Host, IMAGE, Outcome, Run};
use crate::image;
use crate::kvm::{self, Place};
use crate::packages;
use crate::progress::Progress;
use crate::workspace;

/// Wall time of the integration tests with one containerd in the emulated host.
const LIMIT: Duration = Duration::from_secs(2000);

/// Memory of the emulated host in MiB: the tests start twenty virtual machines at once.
const MEMORY_MIB: u32 = 6144;

/// Processors of the emulated host. With two, each emulated by a thread of its own, one boot of a guest in about forty
/// ended in a triple fault, and once the host's own kernel found its stack overwritten; with one nothing of that was seen.
const CPUS: u32 = 1;

/// Deadlines of the tests are so many times longer in the emulated host.
const TIME_SCALE: &str = "4";

/// Failed tests are repeated once in the emulated host, unless there are more than this.
const MOST_REPEATED: usize = 4;

/// Where the integration tests are in the emulated host.
const DIRECTORY: &str = "/opt/tests";

/// A program of integration tests, in one of the ways it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// containerd's task service, driven by `ctr`
    Tasks,
    /// CRI, sandboxes made by containerd's `podsandbox` controller
    Cri,
    /// CRI, sandboxes made by the shim's Sandbox API (containerd 2)
    CriShim,
}

impl Suite {
    const ALL: [Self; 3] = [Self::Tasks, Self::Cri, Self::CriShim];

    fn program(self) -> &'static str {
        match self {
            Self::Tasks => "integration",
            Self::Cri | Self::CriShim => "cri",
        }
    }

    /// The runtime handler of its pods.
    fn handler(self) -> &'static str {
        match self {
            Self::Tasks | Self::Cri => "kata",
            Self::CriShim => "kata-shim",
        }
    }

    /// Name of the directory that its logs go to, behind containerd's version.
    fn suffix(self) -> &'static str {
        match self {
            Self::Tasks => "",
            Self::Cri => "-cri",
            Self::CriShim => "-cri-shim",
        }
    }

    fn runs_with(self, containerd: Containerd) -> bool {
        self != Self::CriShim || containerd != Containerd::V1_7
    }
}

/// Arguments of `cargo xtask test`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Only the unit and property tests
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
    suite: Vec<Suite>,
    /// Install the programs as they were built last; the tests themselves are built
    #[arg(long)]
    no_build: bool,
    /// Seconds that the integration tests with one containerd may take in the emulated host
    #[arg(long, default_value_t = LIMIT.as_secs())]
    timeout: u64,
    /// Arguments of the integration tests: part of a name, `--skip NAME`
    #[arg(last = true)]
    filter: Vec<String>,
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// Runs the tests. The last line says how many passed, failed and were skipped.
///
/// # Errors
/// Something cannot be built or started.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let progress = Progress::new(0);
    let mut counts = Counts::default();
    if !arguments.integration {
        progress.extend(1);
        counts += unit(&progress)?;
    }
    if !arguments.unit {
        counts += integration(&progress, arguments)?;
    }
    println!("{counts}");
    Ok(ExitCode::from(u8::from(counts.failed > 0 || counts.passed == 0)))
}

fn unit(progress: &Progress) -> Result<Counts> {
    packages::ensure(packages::PROGRAMS)?;
    // Tests of the archives and of the root image run these tools.
    packages::ensure(packages::ROOTFS)?;
    packages::ensure(&["cpio"])?;
    ensure_nextest(progress)?;
    progress.step("unit and property tests", |_| {
        let mut child = Command::new(cargo::program())
            .current_dir(workspace::root())
            .args(["nextest", "run", "--workspace", "--no-fail-fast"])
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

/// Copies nextest's output line by line; the counts of its summary.
fn pass_on(stderr: impl Read) -> Result<Option<Counts>> {
    let mut counts = None;
    for line in BufReader::new(stderr).lines() {
        let line = line.context("cannot read nextest's output")?;
        eprintln!("{line}");
        counts = summary(&line).or(counts);
    }
    Ok(counts)
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

fn ensure_nextest(progress: &Progress) -> Result<()> {
    let found = Command::new(cargo::program())
        .args(["nextest", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_ok_and(|status| status.success()) {
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

fn integration(progress: &Progress, arguments: &Arguments) -> Result<Counts> {
    let containerds = match &arguments.containerd {
        Some(one) => vec![*one],
        None => Containerd::ALL.to_vec(),
    };
    progress.extend(ARTIFACT_STEPS + 1);
    let artifacts = if arguments.no_build {
        Artifacts::of(progress, &cargo::built()?)?
    } else {
        Artifacts::build(progress)?
    };
    let suites = if arguments.suite.is_empty() {
        Suite::ALL.to_vec()
    } else {
        arguments.suite.clone()
    };
    let runs: Vec<_> = containerds
        .iter()
        .flat_map(|containerd| suites.iter().map(|suite| (*containerd, *suite)))
        .filter(|(containerd, suite)| suite.runs_with(*containerd))
        .collect();
    let mut build = vec!["test", "--release", "--package=bulkhead-tests", "--no-run"];
    for (program, option) in [("integration", "--test=integration"), ("cri", "--test=cri")] {
        if runs.iter().any(|(_, suite)| suite.program() == program) {
            build.push(option);
        }
    }
    let programs = cargo::build(progress, "integration tests", &build)?;
    match kvm::choose(&artifacts.cli)? {
        Place::Here => here(progress, &programs, &artifacts, &runs, arguments),
        Place::Emulated => emulated(progress, &programs, &artifacts, &runs, arguments),
    }
}

fn emulated(
    progress: &Progress,
    programs: &Programs,
    artifacts: &Artifacts,
    runs: &[(Containerd, Suite)],
    arguments: &Arguments,
) -> Result<Counts> {
    progress.extend(HOST_STEPS);
    let host = Host::build(progress)?;
    let mut counts = Counts::default();
    for (containerd, suite) in runs {
        let logs = begin(*containerd, *suite)?;
        let program = suite.program();
        let run = |filter: &[String]| -> Result<(String, Outcome)> {
            let mut command = vec![format!("{DIRECTORY}/{program}").into(), "--test-threads=1".into()];
            command.extend(filter.iter().map(Into::into));
            let mut run = Run::new(command);
            run.containerd = *containerd;
            run.timeout = Duration::from_secs(arguments.timeout);
            run.memory_mib = MEMORY_MIB;
            run.cpus = CPUS;
            run.transcript = Some(logs.join("output"));
            run.console = Some(logs.join("console"));
            run.out = Some(logs.clone());
            for name in [program, "bulkhead-probe"] {
                run.files
                    .push((format!("{DIRECTORY}/{name}"), programs.get(name)?.to_owned()));
            }
            for (name, value) in [
                ("BULKHEAD_TEST_IMAGE", IMAGE),
                ("BULKHEAD_TEST_HANDLER", suite.handler()),
                ("BULKHEAD_TEST_TIME_SCALE", TIME_SCALE),
                ("BULKHEAD_TEST_LOG_DIR", "/out"),
            ] {
                run.environment.push((name.to_owned(), value.to_owned()));
            }
            let outcome = run.start(&host, Some(artifacts))?;
            let text = fs::read(logs.join("output")).context("cannot read the tests' output")?;
            Ok((String::from_utf8_lossy(&text).into_owned(), outcome))
        };
        let (text, outcome) = run(&arguments.filter)?;
        let mut result = report(&text, outcome);
        let failed = failed(&text);
        if !failed.is_empty() && failed.len() <= MOST_REPEATED && failed.len() as u64 == result.failed {
            // Deadlines in emulation depend on what else the machine does: a second chance, and said aloud.
            eprintln!("once more, those that failed: {}", failed.join(", "));
            let (text, outcome) = run(&[vec!["--exact".to_owned()], failed].concat())?;
            let again = report(&text, outcome);
            eprintln!("passed only when repeated: {}", again.passed);
            result.passed += again.passed;
            result.failed = again.failed;
        }
        counts += result;
        eprintln!("logs: {}", logs.display());
    }
    Ok(counts)
}

/// Names of the tests that failed.
fn failed(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .map(str::to_owned)
        .collect()
}

fn here(
    progress: &Progress,
    programs: &Programs,
    artifacts: &Artifacts,
    runs: &[(Containerd, Suite)],
    arguments: &Arguments,
) -> Result<Counts> {
    progress.extend(1);
    let base = Base::build(progress)?;
    let image = image::busybox(&base.busybox())?;
    let mut counts = Counts::default();
    for (containerd, suite) in runs {
        let logs = begin(*containerd, *suite)?;
        let mut child = here::command(&base, artifacts, *containerd)?
            .arg(programs.get(suite.program())?)
            .arg("--test-threads=1")
            .args(&arguments.filter)
            .env("BULKHEAD_TEST_IMAGE", &image)
            .env("BULKHEAD_TEST_HANDLER", suite.handler())
            .env("BULKHEAD_TEST_CNI_DIR", base.cni())
            .env("BULKHEAD_TEST_LOG_DIR", &logs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run the integration tests")?;
        let stdout = child
            .stdout
            .take()
            .context("the integration tests have no output")?;
        let mut text = String::new();
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read the tests' output")?;
            println!("{line}");
            text += &line;
            text.push('\n');
        }
        let status = child.wait().context("cannot wait for the integration tests")?;
        let code = status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1);
        counts += report(&text, Outcome::Exited(code));
        eprintln!("logs: {}", logs.display());
    }
    Ok(counts)
}

/// Says what is run now; an empty directory for what it leaves behind.
fn begin(containerd: Containerd, suite: Suite) -> Result<PathBuf> {
    let name = format!("{}{}", containerd.version(), suite.suffix());
    eprintln!("integration tests {name} (program {}):", suite.program());
    let directory = workspace::path("target/integration").join(name);
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// The counts in the output of the integration tests. A run that ended before its time is one failure more.
fn report(text: &str, outcome: Outcome) -> Counts {
    let mut counts = Counts::default();
    let result = text.lines().find_map(|line| line.strip_prefix("test result: "));
    let Some(result) = result else {
        for line in text.lines().filter(|line| line.starts_with("test ")) {
            counts.passed += u64::from(line.ends_with(" ok"));
            counts.failed += u64::from(line.ends_with(" FAILED"));
        }
        counts.failed += 1;
        eprintln!("the integration tests did not come to their end ({outcome:?}): counted as one failure");
        return counts;
    };
    for part in result.split([';', '.']) {
        let mut words = part.split_whitespace();
        if let (Some(Ok(number)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) {
            match what {
                "passed" => counts.passed += number,
                "failed" => counts.failed += number,
                "ignored" => counts.skipped += number,
                _ => {}
            }
        }
    }
    if outcome != Outcome::Exited(0) && counts.failed == 0 {
        eprintln!("the integration tests ended with {outcome:?}: counted as one failure");
        counts.failed = 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts {
            passed,
            failed,
            skipped,
        }
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

    #[test]
    fn a_result_of_the_integration_tests_is_understood() {
        let text = "running 6 tests\ntest a ... ok\n\ntest result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; \
            4 filtered out; finished in 1.50s\n";
        assert_eq!(report(text, Outcome::Exited(101)), counts(3, 2, 1));
        let text =
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.00s\n";
        assert_eq!(report(text, Outcome::Exited(0)), counts(3, 0, 0));
        assert_eq!(report(text, Outcome::Exited(1)), counts(3, 1, 0));
    }

    #[test]
    fn failed_tests_are_named() {
        let text = "test a::b ... ok\ntest a::c ... FAILED\ntest result: FAILED. 1 passed; 1 failed\n";
        assert_eq!(failed(text), ["a::c"]);
    }

    #[test]
    fn a_run_that_was_cut_short_is_a_failure() {
        let text = "running 9 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ok\ntest d ... ";
        assert_eq!(report(text, Outcome::TimedOut), counts(2, 2, 0));
        assert_eq!(report("", Outcome::Exited(0)), counts(0, 1, 0));
    }
}
