//! The list of requirements and how it is printed.

use std::fmt::Write;

use serde_json::json;

#[cfg(test)]
mod tests;

/// Answer to one requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Met.
    Yes,
    /// Not met, and no pod can run without it.
    No,
    /// Not met; pods run, with less.
    Missing,
    /// The processor does not offer it, so no kernel asks for it.
    NotOffered,
    /// Not examined, because something before it is not met.
    Unknown,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::Missing => "missing",
            Self::NotOffered => "not offered",
            Self::Unknown => "unknown",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Heading under which it stands.
    pub group: &'static str,
    /// What is required.
    pub name: String,
    /// Whether it is met.
    pub verdict: Verdict,
    /// What was found, or what it is needed for.
    pub reason: String,
    /// What to do about it; empty if nothing is to be done.
    pub remedy: String,
}

/// All requirements in the order they were examined.
#[derive(Clone, Debug, Default)]
pub struct Report {
    requirements: Vec<Requirement>,
}

impl Report {
    /// Adds a requirement.
    pub fn add(
        &mut self,
        group: &'static str,
        name: impl Into<String>,
        verdict: Verdict,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let (name, reason, remedy) = (name.into(), reason.into(), remedy.into());
        self.requirements.push(Requirement {
            group,
            name,
            verdict,
            reason,
            remedy,
        });
    }

    /// Whether a pod can run. An empty report proves nothing.
    pub fn ready(&self) -> bool {
        !self.requirements.is_empty()
            && self
                .requirements
                .iter()
                .all(|requirement| !matches!(requirement.verdict, Verdict::No | Verdict::Unknown))
    }

    /// The report for people: one line a requirement, remedies below the lines they belong to.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let width = self
            .requirements
            .iter()
            .map(|r| r.name.chars().count())
            .max()
            .unwrap_or(0);
        let mut group = "";
        for requirement in &self.requirements {
            if requirement.group != group {
                group = requirement.group;
                line(&mut text, format_args!("{group}"));
            }
            let Requirement {
                name,
                verdict,
                reason,
                remedy,
                ..
            } = requirement;
            line(
                &mut text,
                format_args!("  {:<11}  {name:<width$}  {reason}", verdict.word()),
            );
            if !remedy.is_empty() {
                line(&mut text, format_args!("  {:<11}  -> {remedy}", ""));
            }
        }
        match self.failed().as_slice() {
            [] if self.ready() => line(&mut text, format_args!("A pod can run on this machine.")),
            [] => line(&mut text, format_args!("Nothing was examined.")),
            failed => {
                let names: Vec<&str> = failed.iter().map(|r| r.name.as_str()).collect();
                line(
                    &mut text,
                    format_args!("No pod can run on this machine: {}.", names.join(", ")),
                );
            }
        }
        text
    }

    /// The report for programs: one JSON object and a line end.
    pub fn json(&self) -> String {
        let requirements: Vec<_> = self
            .requirements
            .iter()
            .map(|requirement| {
                json!({
                    "group": requirement.group,
                    "name": requirement.name,
                    "verdict": requirement.verdict.word(),
                    "reason": requirement.reason,
                    "remedy": requirement.remedy,
                })
            })
            .collect();
        format!(
            "{:#}\n",
            json!({ "ready": self.ready(), "requirements": requirements })
        )
    }

    /// The requirements that keep a pod from running.
    pub fn failed(&self) -> Vec<&Requirement> {
        self.requirements
            .iter()
            .filter(|requirement| requirement.verdict == Verdict::No)
            .collect()
    }
}

/// Writing to a `String` cannot fail.
fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{arguments}");
}
