//! Tests that need a machine of their own: the agent's, and those of the whole with each containerd.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::Arguments;
use super::conformance::Shown;
use super::counts::Counts;
use super::suites::{Job, Suite};
use crate::bench;
use crate::cargo::{self, Programs};
use crate::here;
use crate::host::{ARTIFACT_STEPS, Artifacts, Base, HOST_STEPS, Host, IMAGE, Outcome, Run};
use crate::image;
use crate::kvm::{self, Place};
use crate::progress::Progress;

/// Wall time of one suite in the emulated host.
pub const LIMIT: Duration = Duration::from_secs(3000);

/// Memory of the emulated host in MiB: the tests start twenty virtual machines at once.
const MEMORY_MIB: u32 = 6144;

/// Deadlines of the tests are so many times longer in the emulated host.
const TIME_SCALE: &str = "4";

/// Bulkhead's own deadlines, as much longer: hundreds of processes or tens of pods at once share one emulated processor.
const CONFIGURATION: &str = r#"{"boot_timeout_s": 240, "request_timeout_s": 240}"#;

/// Divisor of how many pods or processes the tests of many at once start in the emulated host: an emulated processor
/// takes minutes for the whole number.
const CROWD_DIVISOR: &str = "5";

/// Each step that can fail has one fault of several in the emulated host, so that all of them take minutes.
const FAULT_DIVISOR: &str = "3";

/// Failed tests are repeated once in the emulated host, unless there are more than this.
const MOST_REPEATED: usize = 4;

/// The name of the test that the benchmark's ratios are.
const RATIOS: &str = "benchmark: ratios";

/// Where the integration tests are in the emulated host.
const DIRECTORY: &str = "/opt/tests";

/// Builds everything and runs the tests, on this machine or in the emulated host. `others` are run beside those of
/// emulated hosts, which keep one processor each busy. When all is tested, the benchmark's ratios are too.
///
/// # Errors
/// Something cannot be built or started, or the error of `others`.
pub fn run(
    progress: &Progress,
    arguments: &Arguments,
    others: impl FnOnce() -> Result<Counts> + Send,
) -> Result<Counts> {
    let jobs = Job::chosen(arguments);
    progress.extend(ARTIFACT_STEPS + 1);
    let artifacts = if arguments.no_build {
        Artifacts::of(progress, &cargo::built()?)?
    } else {
        Artifacts::build(progress)?
    };
    let faulty = if jobs.iter().any(|job| job.suite == Suite::Faults) {
        progress.extend(1);
        Some(artifacts.with_faults(progress)?)
    } else {
        None
    };
    let mut build = vec!["test", "--release", "--package=bulkhead-tests", "--no-run"];
    for (program, option) in [("integration", "--test=integration"), ("cri", "--test=cri")] {
        if jobs.iter().any(|job| job.suite.program() == program) {
            build.push(option);
        }
    }
    let mut programs = cargo::build(progress, "integration tests", &build)?;
    if jobs.iter().any(|job| job.suite == Suite::Agent) {
        progress.extend(1);
        // Like the unit tests, whose dependencies are built by now.
        let build = ["test", "--no-run", "--workspace", "--test=guest"];
        programs.extend(cargo::build(progress, "tests of the agent", &build)?);
    }
    let tools = if arguments.integration || !Job::are_all(arguments) {
        None
    } else {
        Some(bench::Tools::build(progress, &bench::Arguments::of_tests())?)
    };
    let shown = Mutex::default();
    let mut counts = match kvm::choose(&artifacts.cli)? {
        Place::Here => {
            let installed = |suite| match &faulty {
                Some(faulty) if suite == Suite::Faults => faulty,
                _ => &artifacts,
            };
            let mut counts = here(progress, &programs, &installed, &jobs, arguments, &shown)?;
            // Here the deadlines of the integration tests are real ones.
            counts += others()?;
            if let Some(tools) = &tools {
                progress.extend(HOST_STEPS);
                counts += ratios(tools, &artifacts, &Host::build(progress)?);
            }
            counts
        }
        Place::Emulated => {
            progress.extend(HOST_STEPS);
            let host = Host::build(progress)?;
            emulated(
                &Emulation {
                    programs: &programs,
                    artifacts: &artifacts,
                    faulty: faulty.as_ref(),
                    host: &host,
                    tools: tools.as_ref(),
                    arguments,
                    shown: &shown,
                },
                &jobs,
                others,
            )?
        }
    };
    if Job::are_all(arguments) {
        counts += lock(&shown).check()?;
    }
    Ok(counts)
}

fn lock(shown: &Mutex<Shown>) -> MutexGuard<'_, Shown> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What every suite in an emulated host uses.
struct Emulation<'a> {
    programs: &'a Programs,
    artifacts: &'a Artifacts,
    /// With a shim that has faults.
    faulty: Option<&'a Artifacts>,
    host: &'a Host,
    /// With what the benchmark measures, if it does.
    tools: Option<&'a bench::Tools>,
    arguments: &'a Arguments,
    shown: &'a Mutex<Shown>,
}

/// What takes a machine.
enum Work<'a> {
    Suite(&'a Job),
    Ratios(&'a bench::Tools),
}

/// Each suite in a machine of its own, as many at once as this one can carry, and the benchmark, whose time is counted in
/// instructions whatever runs beside it. The last of the workers begins when `others` are done.
fn emulated(
    emulation: &Emulation<'_>,
    jobs: &[Job],
    others: impl FnOnce() -> Result<Counts> + Send,
) -> Result<Counts> {
    let suites = jobs.iter().map(Work::Suite);
    let queue = Mutex::new(suites.chain(emulation.tools.map(Work::Ratios)));
    let work = |mut counts: Counts| -> Result<Counts> {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            counts += match next {
                Some(Work::Suite(job)) => emulation.job(job)?,
                Some(Work::Ratios(tools)) => ratios(tools, emulation.artifacts, emulation.host),
                None => return Ok(counts),
            };
        }
    };
    thread::scope(|scope| {
        let mut workers: Vec<_> = (1..machines())
            .map(|_| scope.spawn(|| work(Counts::default())))
            .collect();
        workers.push(scope.spawn(|| work(others()?)));
        let join = |worker: thread::ScopedJoinHandle<'_, Result<Counts>>| {
            let joined = worker.join();
            joined.map_err(|_| anyhow!("a thread that runs tests panicked"))?
        };
        // All are waited for, whatever the first one says.
        let ends: Vec<_> = workers.into_iter().map(join).collect();
        ends.into_iter().sum()
    })
}

/// Compares the benchmark's ratios with those recorded, which counts as one test.
fn ratios(tools: &bench::Tools, artifacts: &Artifacts, host: &Host) -> Counts {
    let outcome = bench::run(&bench::Arguments::of_tests(), tools, artifacts, host);
    match &outcome {
        Ok(()) => eprintln!("{RATIOS} | none is worse than recorded"),
        Err(error) => eprintln!("{RATIOS} | {error:#}"),
    }
    Counts::of(RATIOS, outcome.is_ok())
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
    fn job(&self, job: &Job) -> Result<Counts> {
        let logs = job.logs()?;
        eprintln!(
            "{} | tests in an emulated host; logs: {}",
            job.name,
            logs.display()
        );
        let configuration = logs.join("config.json");
        fs::write(&configuration, CONFIGURATION).context("cannot write the configuration")?;
        let run = |filter: &[String]| -> Result<(String, Outcome)> {
            let mut command = vec![format!("{DIRECTORY}/{}", job.suite.program()).into()];
            if job.suite != Suite::Agent {
                command.push("--test-threads=1".into());
            }
            if let Some(option) = job.suite.figures() {
                command.push(option.into());
            }
            command.extend(job.arguments(filter).map(Into::into));
            let mut run = Run::new(command);
            run.label = Some(job.name.clone());
            run.containerd = job.containerd;
            run.timeout = Duration::from_secs(self.arguments.timeout);
            run.memory_mib = self.arguments.memory.unwrap_or(MEMORY_MIB);
            run.transcript = Some(logs.join("output"));
            run.console = Some(logs.join("console"));
            run.out = Some(logs.clone());
            let known = "/etc/bulkhead/config.json".to_owned();
            run.files.push((known, configuration.clone()));
            // The agent's tests run without images, and so without the probe.
            let probe = (job.suite != Suite::Agent).then_some("bulkhead-probe");
            for name in [Some(job.suite.program()), probe].into_iter().flatten() {
                run.files
                    .push((format!("{DIRECTORY}/{name}"), self.programs.get(name)?.to_owned()));
            }
            for (name, value) in [
                ("BULKHEAD_TEST_IMAGE", IMAGE),
                ("BULKHEAD_TEST_HANDLER", job.suite.handler()),
                ("BULKHEAD_TEST_TIME_SCALE", TIME_SCALE),
                (
                    "BULKHEAD_TEST_CROWD_DIVISOR",
                    if self.arguments.crowds { "1" } else { CROWD_DIVISOR },
                ),
                ("BULKHEAD_TEST_LOG_DIR", "/out"),
                (
                    "BULKHEAD_TEST_LOG_LEVEL",
                    // The machine's files are its memory, and a thousand pods say much.
                    if job.suite == Suite::Soak { "info" } else { "debug" },
                ),
                ("BULKHEAD_TEST_CYCLES", &self.arguments.cycles.to_string()),
                (
                    "BULKHEAD_TEST_FAULT_DIVISOR",
                    if self.arguments.all_faults {
                        "1"
                    } else {
                        FAULT_DIVISOR
                    },
                ),
            ] {
                run.environment.push((name.to_owned(), value.to_owned()));
            }
            let artifacts = match self.faulty {
                Some(faulty) if job.suite == Suite::Faults => faulty,
                _ => self.artifacts,
            };
            let outcome = run.start(self.host, Some(artifacts))?;
            let text = fs::read(logs.join("output")).context("cannot read the tests' output")?;
            Ok((String::from_utf8_lossy(&text).into_owned(), outcome))
        };
        let (text, outcome) = run(&self.arguments.filter)?;
        let mut result = report(&job.name, &text, outcome);
        let failed = failed(&text);
        let mut repeated = None;
        if !failed.is_empty() && failed.len() <= MOST_REPEATED && failed.len() as u64 == result.failed {
            // Deadlines in emulation depend on what else the machine does: a second chance, and said aloud.
            eprintln!(
                "{} | once more, those that failed: {}",
                job.name,
                failed.join(", ")
            );
            let (text, outcome) = run(&[vec!["--exact".to_owned()], failed].concat())?;
            let again = report(&job.name, &text, outcome);
            repeated = Some(text);
            eprintln!("{} | passed only when repeated: {}", job.name, again.passed);
            result.passed += again.passed;
            (result.failed, result.failures) = (again.failed, again.failures);
        }
        lock(self.shown).add(&text, repeated.as_deref());
        eprintln!("{} | {result}", job.name);
        Ok(result)
    }
}

/// One suite after the other, on this machine.
fn here<'a>(
    progress: &Progress,
    programs: &Programs,
    installed: &dyn Fn(Suite) -> &'a Artifacts,
    jobs: &[Job],
    arguments: &Arguments,
    shown: &Mutex<Shown>,
) -> Result<Counts> {
    progress.extend(1);
    let base = Base::build(progress)?;
    let image = image::busybox(&base.busybox())?;
    let mut counts = Counts::default();
    for job in jobs {
        let logs = job.logs()?;
        eprintln!("{} | tests on this machine; logs: {}", job.name, logs.display());
        let program = programs.get(job.suite.program())?;
        let mut command = if job.suite != Suite::Agent {
            let mut command = here::command(&base, installed(job.suite), job.containerd)?;
            command
                .arg(program)
                .arg("--test-threads=1")
                .args(job.arguments(&arguments.filter));
            command
        } else {
            Command::new(program)
        };
        let mut child = command
            .env("BULKHEAD_TEST_IMAGE", &image)
            .env("BULKHEAD_TEST_HANDLER", job.suite.handler())
            .env("BULKHEAD_TEST_CNI_DIR", base.cni())
            .env("BULKHEAD_TEST_LOG_DIR", &logs)
            .env("BULKHEAD_TEST_CYCLES", arguments.cycles.to_string())
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
        lock(shown).add(&text, None);
        counts += report(&job.name, &text, Outcome::Exited(code));
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

/// The counts in the output of the suite `name`. A run that ended before its time is one failure more.
fn report(name: &str, text: &str, outcome: Outcome) -> Counts {
    let mut counts = Counts {
        failures: failed(text).iter().map(|test| format!("{name} {test}")).collect(),
        ..Counts::default()
    };
    let result = text.lines().find_map(|line| line.strip_prefix("test result: "));
    let Some(result) = result else {
        for line in text.lines().filter(|line| line.starts_with("test ")) {
            counts.passed += u64::from(line.ends_with(" ok"));
            counts.failed += u64::from(line.ends_with(" FAILED"));
        }
        counts.failed += 1;
        let last = text
            .lines()
            .rfind(|line| line.starts_with("test "))
            .unwrap_or("no test");
        counts.failures.push(format!(
            "{name} did not come to its end ({outcome:?}), its last line: {last}"
        ));
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
        counts += Counts::of(&format!("{name} ended with {outcome:?}"), false);
    }
    counts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn numbers(counts: &Counts) -> (u64, u64, u64) {
        (counts.passed, counts.failed, counts.skipped)
    }

    #[test]
    fn a_result_of_the_integration_tests_is_understood() {
        let text = "running 6 tests\ntest a ... ok\n\ntest result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; \
            4 filtered out; finished in 1.50s\n";
        assert_eq!(numbers(&report("suite", text, Outcome::Exited(101))), (3, 2, 1));
        let text =
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.00s\n";
        assert_eq!(numbers(&report("suite", text, Outcome::Exited(0))), (3, 0, 0));
        assert_eq!(numbers(&report("suite", text, Outcome::Exited(1))), (3, 1, 0));
    }

    #[test]
    fn failed_tests_are_named() {
        let text = "test a::b ... ok\ntest a::c ... FAILED\ntest result: FAILED. 1 passed; 1 failed\n";
        assert_eq!(failed(text), ["a::c"]);
    }

    #[test]
    fn a_run_that_was_cut_short_is_a_failure() {
        let text = "running 9 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ok\ntest d ... ";
        let counts = report("suite", text, Outcome::TimedOut);
        assert_eq!(numbers(&counts), (2, 2, 0));
        let cut = "suite did not come to its end (TimedOut), its last line: test d ... ";
        assert_eq!(counts.failures, ["suite b", cut]);
        assert_eq!(numbers(&report("suite", "", Outcome::Exited(0))), (0, 1, 0));
    }
}
