//! Tests that need a machine of their own: the agent's, and those of the whole with each containerd.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::{Arguments, Counts};
use crate::cargo::{self, Programs};
use crate::here;
use crate::host::{ARTIFACT_STEPS, Artifacts, Base, Containerd, HOST_STEPS, Host, IMAGE, Outcome, Run};
use crate::image;
use crate::kvm::{self, Place};
use crate::progress::Progress;
use crate::workspace;

/// Wall time of one suite in the emulated host.
pub const LIMIT: Duration = Duration::from_secs(2000);

/// Memory of the emulated host in MiB: the tests start twenty virtual machines at once.
const MEMORY_MIB: u32 = 6144;

/// Deadlines of the tests are so many times longer in the emulated host.
const TIME_SCALE: &str = "4";

/// Failed tests are repeated once in the emulated host, unless there are more than this.
const MOST_REPEATED: usize = 4;

/// Where the integration tests are in the emulated host.
const DIRECTORY: &str = "/opt/tests";

/// One program of tests and the containerd it finds.
struct Suite {
    /// Begins each line of its output, and names the directory of its logs.
    name: &'static str,
    program: &'static str,
    containerd: Containerd,
}

impl Suite {
    /// What `arguments` ask for.
    fn chosen(arguments: &Arguments) -> Vec<Self> {
        let containerds = match arguments.containerd {
            Some(one) => vec![one],
            None => Containerd::ALL.to_vec(),
        };
        let mut suites: Vec<_> = containerds
            .into_iter()
            .map(|containerd| Self {
                name: containerd.version(),
                program: "integration",
                containerd,
            })
            .collect();
        // A filter, like a containerd, is one of the whole's tests.
        if arguments.containerd.is_none() && arguments.filter.is_empty() {
            suites.push(Self {
                name: "agent",
                program: "guest",
                containerd: Containerd::V2_1,
            });
        }
        suites
    }

    /// An empty directory for what the tests leave behind.
    fn logs(&self) -> Result<PathBuf> {
        let directory = workspace::path("target/integration").join(self.name);
        if directory.exists() {
            fs::remove_dir_all(&directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(directory)
    }
}

/// Builds everything and runs the tests, on this machine or in the emulated host.
///
/// # Errors
/// Something cannot be built or started.
pub fn run(progress: &Progress, arguments: &Arguments) -> Result<Counts> {
    let suites = Suite::chosen(arguments);
    progress.extend(ARTIFACT_STEPS + 1);
    let artifacts = Artifacts::build(progress)?;
    let mut programs = cargo::build(
        progress,
        "integration tests",
        &[
            "test",
            "--release",
            "--no-run",
            "--package=bulkhead-tests",
            "--test=integration",
        ],
    )?;
    if suites.iter().any(|suite| suite.program == "guest") {
        progress.extend(1);
        // Like the unit tests, whose dependencies are built by now.
        let build = ["test", "--no-run", "--workspace", "--test=guest"];
        programs.extend(cargo::build(progress, "tests of the agent", &build)?);
    }
    match kvm::choose(&artifacts.cli)? {
        Place::Here => here(progress, &programs, &artifacts, &suites, arguments),
        Place::Emulated => {
            progress.extend(HOST_STEPS);
            let host = Host::build(progress)?;
            emulated(
                &Emulation {
                    programs: &programs,
                    artifacts: &artifacts,
                    host: &host,
                    arguments,
                },
                &suites,
            )
        }
    }
}

/// What every suite in an emulated host uses.
struct Emulation<'a> {
    programs: &'a Programs,
    artifacts: &'a Artifacts,
    host: &'a Host,
    arguments: &'a Arguments,
}

/// Each suite in a machine of its own, as many at once as this one can carry.
fn emulated(emulation: &Emulation<'_>, suites: &[Suite]) -> Result<Counts> {
    let queue = Mutex::new(suites.iter());
    let work = || -> Result<Counts> {
        let mut counts = Counts::default();
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(suite) = next else { return Ok(counts) };
            counts += emulation.suite(suite)?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..machines().min(suites.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let mut counts = Counts::default();
        for worker in workers {
            counts += worker
                .join()
                .map_err(|_| anyhow!("a thread that runs tests panicked"))??;
        }
        Ok(counts)
    })
}

/// How many emulated hosts this machine can run: each keeps a processor busy and fills its memory.
fn machines() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()
    });
    let fit = available.unwrap_or(0) / 1024 / MEMORY_MIB as usize;
    processors.min(fit).max(1)
}

impl Emulation<'_> {
    fn suite(&self, suite: &Suite) -> Result<Counts> {
        let logs = suite.logs()?;
        eprintln!(
            "{} | tests in an emulated host; logs: {}",
            suite.name,
            logs.display()
        );
        let run = |filter: &[String]| -> Result<(String, Outcome)> {
            let mut command = vec![format!("{DIRECTORY}/{}", suite.program).into()];
            if suite.program == "integration" {
                command.push("--test-threads=1".into());
            }
            command.extend(filter.iter().map(Into::into));
            let mut run = Run::new(command);
            run.label = Some(suite.name);
            run.containerd = suite.containerd;
            run.timeout = Duration::from_secs(self.arguments.timeout);
            run.memory_mib = MEMORY_MIB;
            run.transcript = Some(logs.join("output"));
            run.console = Some(logs.join("console"));
            run.out = Some(logs.clone());
            for name in [suite.program, "bulkhead-probe"] {
                run.files
                    .push((format!("{DIRECTORY}/{name}"), self.programs.get(name)?.to_owned()));
            }
            for (name, value) in [
                ("BULKHEAD_TEST_IMAGE", IMAGE),
                ("BULKHEAD_TEST_TIME_SCALE", TIME_SCALE),
                ("BULKHEAD_TEST_LOG_DIR", "/out"),
            ] {
                run.environment.push((name.to_owned(), value.to_owned()));
            }
            let outcome = run.start(self.host, Some(self.artifacts))?;
            let text = fs::read(logs.join("output")).context("cannot read the tests' output")?;
            Ok((String::from_utf8_lossy(&text).into_owned(), outcome))
        };
        let (text, outcome) = run(&self.arguments.filter)?;
        let mut result = report(&text, outcome);
        let failed = failed(&text);
        if !failed.is_empty() && failed.len() <= MOST_REPEATED && failed.len() as u64 == result.failed {
            // Deadlines in emulation depend on what else the machine does: a second chance, and said aloud.
            eprintln!(
                "{} | once more, those that failed: {}",
                suite.name,
                failed.join(", ")
            );
            let (text, outcome) = run(&[vec!["--exact".to_owned()], failed].concat())?;
            let again = report(&text, outcome);
            eprintln!("{} | passed only when repeated: {}", suite.name, again.passed);
            result.passed += again.passed;
            result.failed = again.failed;
        }
        eprintln!("{} | {result}", suite.name);
        Ok(result)
    }
}

/// One suite after the other, on this machine.
fn here(
    progress: &Progress,
    programs: &Programs,
    artifacts: &Artifacts,
    suites: &[Suite],
    arguments: &Arguments,
) -> Result<Counts> {
    progress.extend(1);
    let base = Base::build(progress)?;
    let image = image::busybox(&base.busybox())?;
    let mut counts = Counts::default();
    for suite in suites {
        let logs = suite.logs()?;
        eprintln!("{} | tests on this machine; logs: {}", suite.name, logs.display());
        let program = programs.get(suite.program)?;
        let mut command = if suite.program == "integration" {
            let mut command = here::command(&base, artifacts, suite.containerd)?;
            command
                .arg(program)
                .arg("--test-threads=1")
                .args(&arguments.filter);
            command
        } else {
            Command::new(program)
        };
        let mut child = command
            .env("BULKHEAD_TEST_IMAGE", &image)
            .env("BULKHEAD_TEST_LOG_DIR", &logs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run the tests")?;
        let stdout = child.stdout.take().context("the tests have no output")?;
        let mut text = String::new();
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read the tests' output")?;
            println!("{line}");
            text += &line;
            text.push('\n');
        }
        let status = child.wait().context("cannot wait for the tests")?;
        let code = status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1);
        counts += report(&text, Outcome::Exited(code));
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

    use super::super::tests::counts;
    use super::*;

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
