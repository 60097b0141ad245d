//! `cargo xtask fuzz`: builds the fuzz targets and runs each for a time.
//!
//! Neither cargo-fuzz nor a nightly compiler is needed: the instrumentation is that of any compiler, and the address
//! sanitizer comes with the stable one, which is only asked for it as if it were a nightly.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::cargo;
use crate::packages;
use crate::progress::Progress;
use crate::workspace;

/// What is built and run; there is no other platform.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz asks of the compiler: counters of what has been executed and operands of comparisons, for
/// libFuzzer. They replace the flags of `.cargo/config.toml`: nothing that is linked statically can be watched.
const FLAGS: [&str; 6] = [
    "--cfg fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Finds accesses to memory that is not there, or no longer.
const SANITIZER: &str = "-Zsanitizer=address";

/// Limits of a run: bytes of an input, MiB of one allocation and of all, seconds for one input.
const LIMITS: [&str; 4] = [
    "-max_len=8192",
    "-malloc_limit_mb=64",
    "-rss_limit_mb=2048",
    "-timeout=60",
];

/// Seconds that `cargo xtask test` gives each target.
pub const TEST_SECONDS: u64 = 5;

/// Arguments of `cargo xtask fuzz`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target (repeatable)
    #[arg(long)]
    target: Vec<String>,
}

/// What came of running a target.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Inputs executed.
    runs: u64,
    /// Places in the program that were reached.
    coverage: u64,
    /// Places, told apart by what led there and how often they were passed.
    features: u64,
    /// Inputs kept because they reached something new.
    corpus: u64,
    /// The input that broke something.
    finding: Option<PathBuf>,
}

impl Outcome {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.finding.is_none()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            runs,
            coverage,
            features,
            corpus,
            finding,
        } = self;
        write!(
            formatter,
            "{runs:>9} runs  coverage {coverage:>5}, {features:>6} features  corpus {corpus:>5}  "
        )?;
        match finding {
            None => formatter.write_str("no finding"),
            Some(path) => write!(formatter, "FINDING {}", path.display()),
        }
    }
}

/// Runs the targets; fails if one of them finds something.
///
/// # Errors
/// A target does not exist or cannot be built or started.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let all = targets()?;
    let chosen: Vec<String> = if arguments.target.is_empty() {
        all
    } else {
        for name in &arguments.target {
            ensure!(
                all.contains(name),
                "there is no target {name}; there are {}",
                all.join(", ")
            );
        }
        arguments.target.clone()
    };
    let progress = Progress::new(1 + chosen.len());
    let programs = build(&progress)?;
    let mut clean = true;
    let mut table = String::new();
    for target in &chosen {
        let outcome = run(&progress, &programs, target, arguments.seconds)?;
        clean &= outcome.is_clean();
        table.push_str(&format!("{target:<8}  {outcome}\n"));
    }
    print!("{table}");
    Ok(ExitCode::from(u8::from(!clean)))
}

/// Names of all targets.
///
/// # Errors
/// Their folder cannot be read.
pub fn targets() -> Result<Vec<String>> {
    let folder = workspace::path("fuzz/fuzz_targets");
    let files = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names: Vec<String> = files
        .filter_map(|file| {
            file.ok()?
                .file_name()
                .to_str()?
                .strip_suffix(".rs")
                .map(String::from)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Builds the targets and returns the folder of the programs.
///
/// # Errors
/// The build fails.
pub fn build(progress: &Progress) -> Result<PathBuf> {
    progress.step("fuzz targets", |_| {
        packages::ensure(packages::PROGRAMS)?;
        let folder = workspace::path("target/fuzz");
        let mut flags = FLAGS.join(" ");
        if has_sanitizer()? {
            flags = format!("{flags} {SANITIZER}");
        } else {
            eprintln!(
                "this compiler comes without an address sanitizer: only faults and failed checks are found"
            );
        }
        let status = cargo::in_background()
            .current_dir(workspace::path("fuzz"))
            .args(["build", "--release", "--bins", "--locked", "--target", TRIPLE])
            .arg("--target-dir")
            .arg(&folder)
            .env("RUSTFLAGS", flags)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTC_BOOTSTRAP", "1")
            .stdin(Stdio::null())
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "the fuzz targets cannot be built ({status})");
        Ok(folder.join(TRIPLE).join("release"))
    })
}

/// Whether the compiler has the sanitizer's library; those of distributions may not.
fn has_sanitizer() -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .current_dir(workspace::path("fuzz"))
        .args(["--print=target-libdir", "--target", TRIPLE])
        .output()
        .context("cannot run rustc")?;
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let files = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    Ok(names.into_iter().any(|name| name.ends_with("_rt.asan.a")))
}

/// Runs one target for `seconds`, on the committed corpus and what earlier runs added to it.
///
/// # Errors
/// It cannot be started, or its output makes no sense.
pub fn run(progress: &Progress, programs: &Path, target: &str, seconds: u64) -> Result<Outcome> {
    progress.step(&format!("{target}, {seconds} s"), |_| {
        let work = workspace::path("target/fuzz");
        let own = work.join("corpus").join(target);
        let artifacts = workspace::path("fuzz/artifacts").join(target);
        for folder in [&own, &artifacts, &work.join("log")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let path = work.join("log").join(format!("{target}.log"));
        let log = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let committed = workspace::path("fuzz/corpus").join(target);
        let mut command = Command::new(programs.join(target));
        command
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            // What processes in containers may not do: they have no ptrace.
            .args(["-detect_leaks=0", "-len_control=0", "-print_final_stats=1"])
            .args(LIMITS)
            .arg(&own);
        if committed.is_dir() {
            command.arg(&committed);
        }
        let status = command
            .current_dir(&work)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()
            .with_context(|| format!("cannot run {target}"))?;
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let outcome = outcome(&text);
        if status.success() {
            ensure!(
                outcome.is_clean() && outcome.runs > 0,
                "{target} ran nothing: {}",
                path.display()
            );
            return Ok(outcome);
        }
        eprint!("{}", story(&text));
        match &outcome.finding {
            Some(_) => Ok(outcome),
            None => bail!("{target} ended with {status}: {}", path.display()),
        }
    })
}

/// Reads libFuzzer's log.
fn outcome(log: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for line in log.lines() {
        if let Some(runs) = line.strip_prefix("stat::number_of_executed_units:") {
            outcome.runs = runs.trim().parse().unwrap_or(0);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            outcome.finding = Some(path.trim().into());
        } else if line.starts_with('#') {
            // "#72181  DONE   cov: 2851 ft: 9921 corp: 572/34Kb lim: …"
            let mut words = line.split_whitespace();
            while let Some(word) = words.next() {
                let field = match word {
                    "cov:" => &mut outcome.coverage,
                    "ft:" => &mut outcome.features,
                    "corp:" => &mut outcome.corpus,
                    _ => continue,
                };
                let value = words.next().and_then(|value| value.split('/').next());
                *field = value.and_then(|value| value.parse().ok()).unwrap_or(0);
            }
        }
    }
    outcome
}

/// The lines that tell of a finding: the panic or the sanitizer's report, with some of what follows.
fn story(log: &str) -> String {
    const LINES: usize = 40;
    let tells = |line: &&str| line.contains("panicked at") || line.contains("ERROR: ");
    let start = log.lines().position(|line| tells(&line)).unwrap_or(0);
    let lines = log.lines().skip(start).take(LINES);
    lines.map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
INFO: Loaded 1 modules   (55012 inline 8-bit counters)
#2\tINITED cov: 161 ft: 162 corp: 1/1b exec/s: 0 rss: 65Mb
#72181\tDONE   cov: 2851 ft: 9921 corp: 572/34Kb lim: 166 exec/s: 2328 rss: 489Mb
Done 72181 runs in 31 second(s)
stat::number_of_executed_units: 72181
";

    #[test]
    fn the_last_line_counts() {
        let clean = Outcome {
            runs: 72181,
            coverage: 2851,
            features: 9921,
            corpus: 572,
            finding: None,
        };
        assert_eq!(outcome(LOG), clean);
        assert!(clean.is_clean());
        assert!(clean.to_string().contains("72181 runs"));
    }

    #[test]
    fn a_finding_is_named_with_its_input() {
        let log = format!(
            "{LOG}thread 'main' panicked at src/lib.rs:1:1:\nbroken\n\
             artifact_prefix='/x/'; Test unit written to /x/crash-1\n"
        );
        let outcome = outcome(&log);
        assert_eq!(outcome.finding.as_deref(), Some(Path::new("/x/crash-1")));
        assert!(outcome.to_string().ends_with("FINDING /x/crash-1"));
        assert!(story(&log).starts_with("thread 'main' panicked"));
    }

    #[test]
    fn every_target_has_a_name() {
        let names = targets().unwrap_or_default();
        assert!(names.iter().any(|name| name == "virtio"), "{names:?}");
    }
}
