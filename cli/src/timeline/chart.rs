//! A timeline as a table with bars.

use std::fmt::Write as _;

use bulkhead_sandbox::timeline::{Mark, Record};
use serde_json::json;

/// Characters of the bars' column.
const WIDTH: u64 = 40;

/// Who was at work in a phase, and on what, by the mark that ended it.
const PHASES: &[(&str, &str, &str)] = &[
    ("shim_start", "shim", "is started by containerd"),
    ("shim_ready", "shim", "starts its server"),
    (
        "create_called",
        "containerd",
        "reaches the server, asks for the pod",
    ),
    ("vmm_spawned", "shim", "starts the VMM's process"),
    ("vmm_main", "vmm", "is loaded"),
    (
        "vmm_configured",
        "vmm",
        "enters its jail, receives its configuration",
    ),
    ("vmm_memory", "vmm", "creates the machine, maps its memory"),
    (
        "vmm_kernel_loaded",
        "vmm",
        "loads the kernel, or maps the template",
    ),
    ("vmm_devices", "vmm", "makes devices and vCPUs"),
    ("vm_running", "vmm", "enters the guest"),
    ("agent_main", "guest", "boots its kernel"),
    ("agent_ready", "guest", "mounts its filesystems, dials the host"),
    (
        "template_written",
        "shim, vmm",
        "write the guest down as a template",
    ),
    ("agent_answered", "guest", "gives its first answer"),
    ("sandbox_set_up", "guest", "names itself, mounts the shared tree"),
    ("sandbox_ready", "shim", "configures the network, asks for events"),
    ("container_created", "shim, guest", "make a container"),
    ("container_started", "containerd", "starts the container"),
    ("first_output", "guest", "runs the program up to its first output"),
];

/// One row.
struct Phase<'a> {
    name: &'a str,
    who: &'a str,
    what: String,
    /// Microseconds since the first mark.
    from: u64,
    to: u64,
}

impl Phase<'_> {
    fn took(&self) -> u64 {
        self.to - self.from
    }
}

/// The phases between the marks. The first mark is where the clock starts.
fn phases(marks: &[Mark]) -> Vec<Phase<'_>> {
    let start = marks.first().map_or(0, |mark| mark.monotonic_us);
    let pairs = marks.iter().zip(marks.iter().skip(1));
    pairs
        .map(|(before, mark)| {
            let known = PHASES.iter().find(|(name, _, _)| *name == mark.phase);
            let (who, what) = known.map_or_else(
                || ("", mark.phase.replace('_', " ")),
                |(_, who, what)| (*who, (*what).to_owned()),
            );
            Phase {
                name: &mark.phase,
                who,
                what,
                from: before.monotonic_us.saturating_sub(start),
                to: mark
                    .monotonic_us
                    .saturating_sub(start)
                    .max(before.monotonic_us.saturating_sub(start)),
            }
        })
        .collect()
}

/// The table.
pub fn text(record: &Record) -> String {
    let phases = phases(&record.marks);
    let total = phases.last().map_or(0, |phase| phase.to);
    let ends = (record.marks.first(), record.marks.last());
    let mut text = match ends {
        (Some(first), Some(last)) => format!(
            "pod {}: {} ms from {} to {}\n\n",
            record.sandbox,
            milliseconds(total),
            first.phase,
            last.phase
        ),
        _ => return format!("pod {}: no phase has ended yet\n", record.sandbox),
    };
    let width = phases
        .iter()
        .map(|phase| phase.what.chars().count())
        .max()
        .unwrap_or(0);
    let _ = writeln!(text, "{:>9} {:>9}  {:<11}  what", "at ms", "took ms", "who");
    for phase in &phases {
        let line = format!(
            "{:>9} {:>9}  {:<11}  {:<width$}  {}",
            milliseconds(phase.from),
            milliseconds(phase.took()),
            phase.who,
            phase.what,
            bar(phase, total)
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let mut shares: Vec<(&str, u64)> = Vec::new();
    for phase in phases.iter().filter(|phase| !phase.who.is_empty()) {
        match shares.iter_mut().find(|(who, _)| *who == phase.who) {
            Some((_, sum)) => *sum += phase.took(),
            None => shares.push((phase.who, phase.took())),
        }
    }
    let shares: Vec<_> = shares
        .iter()
        .map(|(who, sum)| format!("{who} {} ms", milliseconds(*sum)))
        .collect();
    let _ = writeln!(text, "\nin all: {}", shares.join("; "));
    text
}

/// Where the phase lies in the whole. One that is there at all has a mark of its own.
fn bar(phase: &Phase<'_>, total: u64) -> String {
    let place = |time: u64| usize::try_from((time * WIDTH + total / 2) / total.max(1)).unwrap_or(0);
    let (from, to) = (place(phase.from), place(phase.to));
    let blank = " ".repeat(from);
    match to - from {
        0 if phase.took() == 0 => String::new(),
        0 => format!("{blank}|"),
        length => format!("{blank}{}", "#".repeat(length)),
    }
}

fn milliseconds(microseconds: u64) -> String {
    format!("{}.{:02}", microseconds / 1000, microseconds % 1000 / 10)
}

/// The phases in microseconds, for programs.
pub fn json(record: &Record) -> String {
    let phase = |phase: &Phase<'_>| json!({"phase": phase.name, "who": phase.who, "from_us": phase.from, "took_us": phase.took()});
    let phases: Vec<_> = phases(&record.marks).iter().map(phase).collect();
    format!("{}\n", json!({"sandbox": record.sandbox, "phases": phases}))
}
