//! Whether this machine's own KVM can run pods.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

/// Where pods run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here,
    /// In the emulated host.
    Emulated,
}

/// Asks `bulkhead check`, and says the answer in one line.
///
/// # Errors
/// The program cannot be run or does not answer as it should.
pub fn choose(cli: &Path) -> Result<Place> {
    let output = Command::new(cli)
        .args(["check", "--host-only", "--json"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", cli.display()))?;
    let answer: Value = serde_json::from_slice(&output.stdout).context("bulkhead check did not answer")?;
    if output.status.success() {
        eprintln!("KVM: pods run on this machine (bulkhead check: ready)");
        return Ok(Place::Here);
    }
    eprintln!(
        "KVM: pods run in the emulated host, because bulkhead check says: {}",
        obstacle(&answer)
    );
    Ok(Place::Emulated)
}

/// The first requirement that is not met.
fn obstacle(answer: &Value) -> String {
    let text = |requirement: &Value, key: &str| requirement[key].as_str().unwrap_or("?").to_owned();
    let requirements = answer["requirements"].as_array().map_or(&[][..], Vec::as_slice);
    requirements
        .iter()
        .find(|requirement| requirement["verdict"] == "no")
        .map_or_else(
            || "not ready".to_owned(),
            |requirement| format!("{}: {}", text(requirement, "name"), text(requirement, "reason")),
        )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::obstacle;

    #[test]
    fn the_first_unmet_requirement_is_the_reason() {
        let answer = json!({"ready": false, "requirements": [
            {"name": "root", "verdict": "yes", "reason": "uid 0"},
            {"name": "KVM", "verdict": "no", "reason": "no /dev/kvm"},
            {"name": "guest", "verdict": "unknown", "reason": ""},
        ]});
        assert_eq!(obstacle(&answer), "KVM: no /dev/kvm");
        assert_eq!(obstacle(&json!({})), "not ready");
    }
}
