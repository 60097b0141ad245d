//! Running other programs.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Lines of a failed program's output that go into the error.
const TAIL_LINES: usize = 20;

/// Runs `command` with its output in the file `log`, and without input.
///
/// # Errors
/// It cannot be started, or fails: then with the last lines of its output.
pub fn run(command: &mut Command, log: &Path) -> Result<()> {
    let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot share the log")?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if status.success() {
        return Ok(());
    }
    bail!(
        "{} failed ({status}); its last lines:\n{}",
        name(command),
        tail(log)
    )
}

/// The standard output of `command`, run without input.
///
/// # Errors
/// It cannot be started or fails, or its output is not UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", name(command)))?;
    ensure!(
        output.status.success(),
        "{} failed ({}): {}",
        name(command),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).with_context(|| format!("the output of {} is not UTF-8", name(command)))
}

/// The last lines of a file; empty when it cannot be read.
#[must_use]
pub fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}
