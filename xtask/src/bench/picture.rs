//! The picture of a start: the phases of one that boots and of one that goes on from a template, on one scale.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

/// A start and its title.
pub struct Start {
    /// Above its phases.
    pub title: &'static str,
    /// As [`phases`] makes them.
    pub phases: Vec<Phase>,
}

/// What lies between a mark of a timeline and the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Name of the mark.
    name: String,
    /// Microseconds from the first mark.
    from: u64,
    to: u64,
}

/// Widths and heights in pixels.
const WIDTH: u64 = 960;
const NAMES: u64 = 170;
const BARS: u64 = 640;
const ROW: u64 = 18;
const TITLE: u64 = 30;

/// Who is at work in a phase, by the beginning of its mark's name, and its colour.
const WHO: [(&str, &str, &str); 7] = [
    ("create_called", "containerd", "#8a8f98"),
    ("container_started", "containerd", "#8a8f98"),
    ("container_created", "shim and guest", "#3a9e6e"),
    ("shim", "shim", "#3b6fb6"),
    ("vmm_spawned", "shim", "#3b6fb6"),
    ("vm", "VMM", "#d98032"),
    ("", "guest", "#3a9e6e"),
];

fn who(name: &str) -> (&'static str, &'static str) {
    let (_, who, colour) = WHO
        .iter()
        .find(|(beginning, _, _)| name.starts_with(beginning))
        .unwrap_or(&WHO[WHO.len() - 1]);
    (who, colour)
}

/// The phases of a saved timeline.
///
/// # Errors
/// It is none.
pub fn phases(timeline: &Value) -> Result<Vec<Phase>> {
    let marks = timeline["marks"]
        .as_array()
        .context("the timeline has no marks")?;
    let mut times = marks
        .iter()
        .map(|mark| Some((mark["monotonic_us"].as_u64()?, mark["phase"].as_str()?)))
        .collect::<Option<Vec<_>>>()
        .context("the timeline has a mark without name or time")?;
    times.sort_by_key(|(time, _)| *time);
    let start = times.first().context("the timeline is empty")?.0;
    Ok(times
        .iter()
        .zip(times.iter().skip(1))
        .map(|((from, _), (to, name))| Phase {
            name: (*name).to_owned(),
            from: from - start,
            to: to - start,
        })
        .collect())
}

/// The starts as an SVG image.
pub fn draw(starts: &[Start]) -> String {
    let longest = starts
        .iter()
        .filter_map(|start| start.phases.last())
        .map(|phase| phase.to)
        .max()
        .unwrap_or(0)
        .max(1);
    let rows: u64 = starts.iter().map(|start| start.phases.len() as u64).sum();
    let height = rows * ROW + starts.len() as u64 * TITLE + 10;
    let x = |time: u64| NAMES + time * BARS / longest;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut y = 0;
    for start in starts {
        y += TITLE;
        let total = start.phases.last().map_or(0, |phase| phase.to);
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{}\" font-weight=\"bold\">{}: {} virtual ms</text>",
            y - 10,
            start.title,
            ms(total)
        );
        for phase in &start.phases {
            let (who, colour) = who(&phase.name);
            let width = (x(phase.to) - x(phase.from)).max(1);
            let name = phase.name.replace('_', " ");
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{}\" y=\"{}\" width=\"{width}\" height=\"{}\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"{}\" fill=\"#555\">{} {who}</text>",
                NAMES - 6,
                y + 13,
                x(phase.from),
                y + 3,
                ROW - 6,
                x(phase.to) + 5,
                y + 13,
                ms(phase.to - phase.from),
            );
            y += ROW;
        }
    }
    svg + "</svg>\n"
}

fn ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn phases_are_drawn_by_time_on_one_scale() {
        let timeline = json!({"marks": [
            {"phase": "vmm_main", "monotonic_us": 1500},
            {"phase": "shim_start", "monotonic_us": 1000},
            {"phase": "agent_answered", "monotonic_us": 21_000},
        ]});
        let found = phases(&timeline).unwrap();
        assert_eq!(
            found
                .iter()
                .map(|phase| (&*phase.name, phase.from, phase.to))
                .collect::<Vec<_>>(),
            [("vmm_main", 0, 500), ("agent_answered", 500, 20_000)]
        );
        let short = Start {
            title: "short",
            phases: found[..1].to_vec(),
        };
        let svg = draw(&[
            Start {
                title: "long",
                phases: found,
            },
            short,
        ]);
        assert!(svg.contains("long: 20.0 virtual ms") && svg.contains("short: 0.5 virtual ms"));
        assert_eq!(
            svg.matches(&format!("width=\"{}\"", BARS * 500 / 20_000)).count(),
            2
        );
        assert!(svg.contains(">19.5 guest<") && svg.contains(">0.5 VMM<"));
        assert!(phases(&json!({"marks": []})).is_err());
        assert!(phases(&json!({"marks": [{"phase": "a"}]})).is_err());
    }
}
