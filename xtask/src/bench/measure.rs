//! Taking the values: runs of the emulated host, and what they print and leave behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::picture::{self, Start};
use super::{Arguments, Part, Tools};
use crate::host::{Artifacts, Host, IMAGE, Outcome, Run};
use crate::workspace;

/// Values of one name, in the order in which they were measured.
pub type Values = BTreeMap<String, Vec<u64>>;

/// How often a part is tried: a machine may be too slow for its time limit.
const TRIES: u32 = 2;

/// Runtime handlers whose pods are measured, as the tests' containerd has them.
const HANDLERS: [&str; 3] = ["runc", "kata", "kata-shim"];

/// Starts at the same time, and memory in MiB of a machine that has room for the most of them.
const PARALLEL: (&str, u32) = ("1 10 50", 6144);

/// Where the programs that measure are in the emulated host.
const DIRECTORY: &str = "/opt/bench";

/// What is measured with.
pub struct Bench<'a> {
    /// The command's arguments.
    pub arguments: &'a Arguments,
    /// Bulkhead.
    pub artifacts: &'a Artifacts,
    /// Programs that measure, and the peers.
    pub tools: &'a Tools,
    /// The machine.
    pub host: &'a Host,
    /// An empty directory.
    pub out: &'a Path,
}

impl Bench<'_> {
    /// Measures a part; what is worth saying about how it went is added to `remarks`, and to `starts` what there is to
    /// draw.
    ///
    /// # Errors
    /// A measurement fails, or no machine came to its end within the time limit.
    pub fn measure(&self, part: Part, remarks: &mut Vec<String>, starts: &mut Vec<Start>) -> Result<Values> {
        let files = self.out.join(part.name());
        if files.exists() {
            // Of another machine that has measured the same.
            fs::remove_dir_all(&files).with_context(|| format!("cannot remove {}", files.display()))?;
        }
        let transcript = self.out.join(format!("{}.transcript", part.name()));
        let mut run = self.run(part)?;
        run.deterministic = !self.arguments.real_time;
        run.timeout = Duration::from_secs(self.arguments.timeout);
        run.label = Some(part.name().to_owned());
        run.out = Some(files.clone());
        run.transcript = Some(transcript.clone());
        repeat(part, self.arguments.timeout, remarks, || {
            run.start(self.host, Some(self.artifacts))
        })?;
        let text = fs::read_to_string(&transcript).context("cannot read the benchmark's output")?;
        let mut values = parse(&text)?;
        if part == Part::Containers {
            for (kind, title) in [("cold", "Boots"), ("template", "Goes on from a template")] {
                let timelines = timelines(&files.join("timeline").join(kind))?;
                starts.push(Start {
                    title,
                    phases: picture::phases(&timelines[0])?,
                });
                for timeline in timelines {
                    values
                        .entry(format!("{kind}_agent_ready"))
                        .or_default()
                        .push(span(&timeline, "vmm_main", "agent_answered")?);
                }
            }
        }
        Ok(values)
    }

    /// The machine and the command of a part.
    fn run(&self, part: Part) -> Result<Run> {
        let rounds = self.arguments.rounds.to_string();
        let at = |name: &str| format!("{DIRECTORY}/{name}");
        let program = |name: &str| -> Result<_> { Ok((at(name), self.tools.programs.get(name)?.to_owned())) };
        let script = |name: &str| (at(name), workspace::path(&format!("tests/host/{name}")));
        match part {
            Part::Containers => {
                let mut run = Run::new(vec!["with-containerd".into(), at("bench").into()]);
                run.files = vec![script("bench"), script("bench-common"), program("boot")?];
                run.files.extend(self.tools.peers.files());
                // QEMU as a peer, in the host: of the same release as the host's root.
                run.trees = vec![self.host.machine.qemu_tree()];
                run.environment = vec![
                    ("BENCH_ROUNDS".to_owned(), rounds),
                    ("BENCH_BOOT".to_owned(), at("boot")),
                ];
                Ok(run)
            }
            Part::Parallel => {
                let mut run = Run::new(vec!["with-containerd".into(), at("bench-parallel").into()]);
                let (counts, memory_mib) = PARALLEL;
                run.memory_mib = memory_mib;
                run.files = vec![script("bench-parallel"), script("bench-common")];
                run.environment = vec![("BENCH_COUNTS".to_owned(), counts.to_owned())];
                Ok(run)
            }
            Part::Io => {
                let mut run = Run::new(vec!["with-containerd".into(), at("bench-io").into()]);
                run.files = vec![script("bench-io"), script("bench-common")];
                run.files.extend([program("io-load")?, program("boot")?]);
                run.files.extend(self.tools.peers.files());
                run.trees = vec![self.host.machine.qemu_tree()];
                run.environment = vec![
                    ("BENCH_ROUNDS".to_owned(), rounds),
                    ("BENCH_FILES".to_owned(), self.arguments.files.to_string()),
                    ("BENCH_LOAD".to_owned(), at("io-load")),
                    ("BENCH_BOOT".to_owned(), at("boot")),
                ];
                Ok(run)
            }
            Part::Pods => {
                let mut command = vec![at("pod-starts").into(), rounds.into()];
                command.extend(HANDLERS.map(Into::into));
                let mut run = Run::new(command);
                run.files = vec![program("pod-starts")?, program("bulkhead-probe")?];
                // Deadlines, not times: as the integration tests have them in the emulated host.
                for (name, value) in [
                    ("BULKHEAD_TEST_IMAGE", IMAGE),
                    ("BULKHEAD_TEST_TIME_SCALE", "4"),
                    ("BULKHEAD_TEST_LOG_LEVEL", "info"),
                ] {
                    run.environment.push((name.to_owned(), value.to_owned()));
                }
                Ok(run)
            }
        }
    }
}

/// Starts a machine that measures `part`, and another one if it did not end within `limit` seconds.
fn repeat(
    part: Part,
    limit: u64,
    remarks: &mut Vec<String>,
    mut start: impl FnMut() -> Result<Outcome>,
) -> Result<()> {
    for attempt in 1..=TRIES {
        match start()? {
            Outcome::Exited(0) => return Ok(()),
            Outcome::Exited(code) => bail!("the benchmark of {} ended with exit code {code}", part.name()),
            Outcome::TimedOut => {
                let remark = format!(
                    "{}: machine {attempt} of {TRIES} was stopped after {limit} s",
                    part.name()
                );
                eprintln!("{remark}");
                remarks.push(remark);
            }
        }
    }
    bail!("{} is not measured: {}", part.name(), remarks.join("; "))
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
    // Of the starts that are timed, one at a time: idle pods and forks run into each other.
    paths.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        ["ours", "cold"].iter().any(|kind| name.starts_with(kind))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_collected_by_name() {
        let values = parse("noise\nbench a 3\nbench b 1\nbench a 2\n").unwrap();
        assert_eq!((&values["a"][..], &values["b"][..]), (&[3, 2][..], &[1][..]));
        assert!(parse("bench x y").is_err());
        assert!(parse("bench x").is_err());
    }

    #[test]
    fn a_missing_mark_is_named() {
        let timeline = json!({"marks": [{"phase": "vmm_main", "monotonic_us": 5}]});
        let error = span(&timeline, "vmm_main", "agent_answered").unwrap_err();
        assert!(error.to_string().contains("agent_answered"), "{error}");
    }

    #[test]
    fn a_machine_that_does_not_end_is_repeated_once_and_named() {
        let run = |outcomes: &[Outcome]| {
            let mut outcomes = outcomes.iter();
            let mut remarks = Vec::new();
            let result = repeat(Part::Pods, 9, &mut remarks, || Ok(*outcomes.next().unwrap()));
            (result, remarks)
        };
        let (result, remarks) = run(&[Outcome::Exited(0)]);
        assert!(result.is_ok() && remarks.is_empty());
        let (result, remarks) = run(&[Outcome::TimedOut, Outcome::Exited(0)]);
        result.unwrap();
        assert_eq!(remarks, ["pods: machine 1 of 2 was stopped after 9 s"]);
        let (result, remarks) = run(&[Outcome::TimedOut, Outcome::TimedOut]);
        assert!(result.is_err() && remarks.len() == 2);
        // A failure is none that another try would hide.
        assert!(run(&[Outcome::Exited(3)]).0.is_err());
    }
}
