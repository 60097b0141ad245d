//! `cargo xtask bench`: what a start costs, beside the peers, in instructions.
//!
//! Everything is measured in the emulated host in its deterministic mode, where an instruction takes 2 ns of virtual
//! time. The ratios hold; the times are not those of any hardware. What is compared is measured in one machine.
//!
//! What is compared with what is data: `xtask/bench/rows.json`. A ratio that is worse than the one recorded in
//! `xtask/bench/ratios.json` by more than a twentieth, in two machines one after the other, fails the benchmark.
//! `cargo xtask test` runs a part of it.

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
use self::picture::Start;
use self::rows::{Ratios, Rows, Second};
use crate::cache;
use crate::cargo::{self, Programs};
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
    /// Work of a guest's filesystem, disk, network and vsock devices
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

/// How often each start or piece of work is repeated.
const ROUNDS: u32 = 3;

/// Seconds after which a machine is stopped.
const TIMEOUT: u64 = 1500;

/// Files that a guest creates, looks at and removes, in the first round alone.
const FILES: u32 = 10_000;

/// Arguments of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// How often each start is repeated
    #[arg(long, default_value_t = ROUNDS)]
    rounds: u32,
    /// Seconds after which a machine is stopped; one that was is repeated once
    #[arg(long, default_value_t = TIMEOUT)]
    timeout: u64,
    /// Only this part (repeatable)
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Files that a guest creates, looks at and removes, in the first round alone
    #[arg(long, default_value_t = FILES, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,
    /// Real time instead of counted instructions: quick, and good for no comparison
    #[arg(long)]
    real_time: bool,
    /// Write the ratios down as those that later ones are compared with, and draw docs/start.svg
    #[arg(long, conflicts_with = "real_time")]
    record: bool,
}

impl Arguments {
    /// What every change has to pass: the part that takes minutes.
    #[must_use]
    pub fn of_tests() -> Self {
        Self {
            rounds: ROUNDS,
            timeout: TIMEOUT,
            part: vec![Part::Containers],
            files: FILES,
            real_time: false,
            record: false,
        }
    }

    /// The parts in the order in which they are measured.
    fn parts(&self) -> Vec<Part> {
        let mut parts = Part::value_variants().to_vec();
        parts.retain(|part| self.part.is_empty() || self.part.contains(part));
        parts
    }

    /// Whether the ratios are compared with those recorded.
    fn judges(&self) -> bool {
        !self.record && !self.real_time
    }
}

/// What measures, beside the emulated host and Bulkhead.
#[derive(Debug)]
pub struct Tools {
    rows: Rows,
    ratios: Ratios,
    peers: Peers,
    programs: Programs,
}

impl Tools {
    /// Builds what the parts of `arguments` need, unless it is cached.
    ///
    /// # Errors
    /// Something cannot be built, or a file of the benchmark is not valid.
    pub fn build(progress: &Progress, arguments: &Arguments) -> Result<Self> {
        let rows = Rows::load(&rows_file())?;
        let ratios = Ratios::load(&ratios_file(), &rows)?;
        let parts = arguments.parts();
        progress.extend(2);
        let peers = Peers::build(progress)?;
        let mut programs = cargo::build(
            progress,
            "boot program",
            &["build", "--release", "--package=bulkhead-vmm", "--example=boot"],
        )?;
        if [Part::Pods, Part::Io].iter().any(|part| parts.contains(part)) {
            progress.extend(1);
            programs.extend(cargo::build(
                progress,
                "programs that start pods and load devices",
                &["build", "--release", "--package=bulkhead-tests", "--bins"],
            )?);
        }
        Ok(Self {
            rows,
            ratios,
            peers,
            programs,
        })
    }
}

/// Runs the benchmark and prints its tables.
///
/// # Errors
/// Something cannot be built, a measurement fails, or a ratio is worse than the recorded one.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let progress = Progress::new(ARTIFACT_STEPS + HOST_STEPS);
    let artifacts = Artifacts::build(&progress)?;
    let host = Host::build(&progress)?;
    let tools = Tools::build(&progress, arguments)?;
    run(arguments, &tools, &artifacts, &host)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures, prints the tables, and judges or records the ratios.
///
/// # Errors
/// A measurement fails, or a ratio is worse than the recorded one.
pub fn run(arguments: &Arguments, tools: &Tools, artifacts: &Artifacts, host: &Host) -> Result<()> {
    let out = cache::directory("bench")?.join(std::process::id().to_string());
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let bench = Bench {
        arguments,
        artifacts,
        tools,
        host,
        out: &out,
    };
    let mut findings = Findings::default();
    let mut parts = arguments.parts();
    let mut failed = None;
    let ratios = Some(&tools.ratios).filter(|_| arguments.judges());
    parts.retain(|part| {
        let measure = |remarks: &mut _, starts: &mut _| bench.measure(*part, remarks, starts);
        match findings.take(*part, &tools.rows, ratios, measure) {
            Ok(()) => true,
            Err(error) => {
                failed.get_or_insert(error);
                false
            }
        }
    });
    fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    // What was measured is shown, whatever became of the rest.
    if !parts.is_empty() {
        let table = table::table(&tools.rows, &parts, &findings.values, &tools.ratios)?;
        println!("\n{table}");
    }
    findings.print();
    if arguments.record {
        tools
            .ratios
            .record(&ratios_file(), &tools.rows, &parts, &findings.values)?;
        if !findings.starts.is_empty() {
            let file = workspace::path("docs/start.svg");
            fs::write(&file, picture::draw(&findings.starts))
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    ensure!(findings.second.worse.is_empty(), "ratios are worse than recorded");
    Ok(())
}

/// What the parts came to.
#[derive(Default)]
struct Findings {
    /// Of the first machine of each part.
    values: Values,
    /// What to draw, likewise.
    starts: Vec<Start>,
    /// How it went.
    remarks: Vec<String>,
    /// Ratios worth recording.
    news: Vec<String>,
    /// Ratios that were worse in the first machine.
    second: Second,
}

impl Findings {
    /// Measures a part. If a ratio is worse than one of `ratios`, all of the part is measured once more, in another machine:
    /// only what is worse there too is no noise.
    fn take(
        &mut self,
        part: Part,
        rows: &Rows,
        ratios: Option<&Ratios>,
        mut measure: impl FnMut(&mut Vec<String>, &mut Vec<Start>) -> Result<Values>,
    ) -> Result<()> {
        let values = measure(&mut self.remarks, &mut self.starts)?;
        if let Some(ratios) = ratios {
            let verdict = ratios.judge(rows.of(&[part]), &values)?;
            self.news.extend(verdict.news);
            if !verdict.worse.is_empty() {
                let ids: Vec<_> = verdict.worse.iter().map(|worse| worse.id.as_str()).collect();
                let remark = format!(
                    "{}: measured in a second machine, because worse than recorded in the first: {}",
                    part.name(),
                    ids.join(", ")
                );
                eprintln!("{remark}");
                self.remarks.push(remark);
                let again = measure(&mut self.remarks, &mut Vec::new())?;
                let second = ratios.judge_again(verdict.worse, rows.of(&[part]), &again)?;
                self.second.worse.extend(second.worse);
                self.second.noise.extend(second.noise);
            }
        }
        self.values.extend(values);
        Ok(())
    }

    fn print(&self) {
        for remark in &self.remarks {
            println!("{remark}");
        }
        for (title, lines) in [
            ("To be recorded (--record):", &self.news),
            (
                "Worse than recorded in the first machine only, which is noise:",
                &self.second.noise,
            ),
            ("Worse than recorded in both machines:", &self.second.worse),
        ] {
            if !lines.is_empty() {
                println!("{title}\n  {}", lines.join("\n  "));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// What becomes of a part of two rows, each recorded as 1, when our values are these in one machine after the other;
    /// and how many machines were started.
    fn findings(judged: bool, machines: &[[u64; 2]]) -> (Findings, usize) {
        let row = |id: &str| {
            format!(
                r#"{{"id": "{id}", "part": "pods", "table": "t", "what": "x", "ours": ["{id}"], "peer": "p", "theirs": ["p"]}}"#
            )
        };
        let rows: Rows = serde_json::from_str(&format!(
            r#"{{"tables": [], "rows": [{}, {}]}}"#,
            row("a"),
            row("b")
        ))
        .unwrap();
        let ratios = Ratios::of(&[("a", 1.0), ("b", 1.0)]);
        let mut findings = Findings::default();
        let mut started = 0;
        let measure = |_: &mut _, starts: &mut Vec<Start>| {
            let [a, b] = machines[started];
            started += 1;
            starts.push(Start {
                title: "x",
                phases: Vec::new(),
            });
            let name = |name: &str, value| (name.to_owned(), vec![value]);
            Ok(Values::from([name("a", a), name("b", b), name("p", 100)]))
        };
        let ratios = Some(&ratios).filter(|_| judged);
        findings.take(Part::Pods, &rows, ratios, measure).unwrap();
        assert_eq!(findings.starts.len(), 1);
        (findings, started)
    }

    #[test]
    fn a_part_with_a_worse_ratio_is_measured_in_a_second_machine() {
        let (found, started) = findings(true, &[[104, 90]]);
        assert_eq!(started, 1);
        assert!(found.second == Second::default() && found.remarks.is_empty());
        assert_eq!(found.news.len(), 1);

        let (found, started) = findings(true, &[[110, 120], [100, 130]]);
        assert_eq!(started, 2);
        assert_eq!((found.second.noise.len(), found.second.worse.len()), (1, 1));
        assert!(found.second.worse[0].starts_with("b (x, beside p): 1.200"));
        assert_eq!(
            found.remarks,
            ["pods: measured in a second machine, because worse than recorded in the first: a, b"]
        );
        // The table shows the first one, by which the part was found worth a second.
        assert_eq!(found.values["a"], [110]);

        let (found, started) = findings(false, &[[200, 200]]);
        assert_eq!((started, found.second), (1, Second::default()));
    }

    #[test]
    fn tests_measure_a_part_that_is_judged() {
        let arguments = Arguments::of_tests();
        assert!(arguments.judges());
        assert_eq!(arguments.parts(), [Part::Containers]);
    }
}
