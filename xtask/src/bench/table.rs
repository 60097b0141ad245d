//! The values as tables in Markdown.

use anyhow::{Context, Result};

use super::Part;
use super::measure::Values;

/// A row: what it is, our value, the peer's name and value.
struct Row(&'static str, &'static str, &'static str, &'static str);

const CONTAINERS: [Row; 3] = [
    Row("`ctr run` to first output", "ours_run", "runc", "runc_run"),
    Row(
        "VMM process start to the agent's connection (peer: to init's first line)",
        "ours_boot",
        "QEMU microvm",
        "qemu_boot",
    ),
    Row(
        "the same in `ctr run`, VMM's main to the agent's first answer",
        "ours_agent_ready",
        "QEMU microvm",
        "qemu_boot",
    ),
];

const PODS: [Row; 4] = [
    Row(
        "`RunPodSandbox`, handler `kata`",
        "sandbox_kata",
        "runc",
        "sandbox_runc",
    ),
    Row(
        "`RunPodSandbox`, handler `kata-shim`",
        "sandbox_kata-shim",
        "runc",
        "sandbox_runc",
    ),
    Row("pod ready, handler `kata`", "ready_kata", "runc", "ready_runc"),
    Row(
        "pod ready, handler `kata-shim`",
        "ready_kata-shim",
        "runc",
        "ready_runc",
    ),
];

/// The tables of what was measured.
///
/// # Errors
/// A value of one of `parts` is missing.
pub fn table(parts: &[Part], values: &Values) -> Result<String> {
    let mut tables = Vec::new();
    let mut starts =
        String::from("| start, virtual ms (median; all) | Bulkhead | peer | ratio |\n|---|---|---|---|\n");
    for part in parts {
        let rows = match part {
            Part::Containers => &CONTAINERS[..],
            Part::Pods => &PODS[..],
        };
        for Row(what, ours, peer, theirs) in rows {
            let (ours, theirs) = (get(values, ours)?, get(values, theirs)?);
            let ratio = median(ours) as f64 / median(theirs) as f64;
            starts += &format!(
                "| {what} | {} | {peer} {} | {ratio:.2} |\n",
                milliseconds(ours),
                milliseconds(theirs)
            );
        }
    }
    tables.push(starts);
    if parts.contains(&Part::Containers) {
        tables.push(memory(values)?);
    }
    Ok(tables.join("\n"))
}

fn memory(values: &Values) -> Result<String> {
    let of = |name: &str| get(values, name).map(median);
    let (shim, vmm) = (of("ours_shim_pss")?, of("ours_vmm_pss")?);
    let (runc_shim, process) = (of("runc_shim_pss")?, of("runc_process_pss")?);
    Ok(format!(
        "| memory of an idle pod, PSS in MiB, two running | Bulkhead | runc | ratio |\n|---|---|---|---|\n\
         | shim + VMM with guest (runc: shim + process) | {} + {} = {} | {} + {} = {} | {:.2} |\n",
        mebibytes(shim),
        mebibytes(vmm),
        mebibytes(shim + vmm),
        mebibytes(runc_shim),
        mebibytes(process),
        mebibytes(runc_shim + process),
        (shim + vmm) as f64 / (runc_shim + process) as f64
    ))
}

fn get<'a>(values: &'a Values, name: &str) -> Result<&'a [u64]> {
    values
        .get(name)
        .map(Vec::as_slice)
        .with_context(|| format!("{name} was not measured"))
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

fn milliseconds(microseconds: &[u64]) -> String {
    let one = |value: u64| format!("{:.1}", value as f64 / 1000.0);
    let all: Vec<String> = microseconds.iter().map(|value| one(*value)).collect();
    format!("{} ({})", one(median(microseconds)), all.join(", "))
}

fn mebibytes(kibibytes: u64) -> String {
    format!("{:.1}", kibibytes as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn values(list: &[(&str, &[u64])]) -> Values {
        list.iter()
            .map(|(name, values)| ((*name).to_owned(), values.to_vec()))
            .collect()
    }

    #[test]
    fn values_of_containers_become_tables() {
        let values = values(&[
            ("ours_run", &[600_000, 500_000, 520_000]),
            ("runc_run", &[400_000]),
            ("qemu_boot", &[200_000]),
            ("ours_agent_ready", &[100_000]),
            ("ours_boot", &[100_000]),
            ("ours_shim_pss", &[1024]),
            ("ours_vmm_pss", &[9216]),
            ("runc_shim_pss", &[10240]),
            ("runc_process_pss", &[0]),
        ]);
        let table = table(&[Part::Containers], &values).unwrap();
        for row in [
            "| 520.0 (600.0, 500.0, 520.0) | runc 400.0 (400.0) | 1.30 |",
            "| QEMU microvm 200.0 (200.0) | 0.50 |",
            "1.0 + 9.0 = 10.0 | 10.0 + 0.0 = 10.0 | 1.00 |",
        ] {
            assert!(table.contains(row), "{table}");
        }
        assert!(!table.contains("RunPodSandbox"), "{table}");
    }

    #[test]
    fn values_of_pods_become_a_table() {
        let values = values(&[
            ("sandbox_runc", &[100_000]),
            ("sandbox_kata", &[150_000]),
            ("sandbox_kata-shim", &[125_000]),
            ("ready_runc", &[200_000]),
            ("ready_kata", &[400_000]),
            ("ready_kata-shim", &[100_000]),
        ]);
        let table = table(&[Part::Pods], &values).unwrap();
        for row in [
            "| `RunPodSandbox`, handler `kata` | 150.0 (150.0) | runc 100.0 (100.0) | 1.50 |",
            "| `RunPodSandbox`, handler `kata-shim` | 125.0 (125.0) | runc 100.0 (100.0) | 1.25 |",
            "| pod ready, handler `kata` | 400.0 (400.0) | runc 200.0 (200.0) | 2.00 |",
            "| pod ready, handler `kata-shim` | 100.0 (100.0) | runc 200.0 (200.0) | 0.50 |",
        ] {
            assert!(table.contains(row), "{table}");
        }
        assert!(!table.contains("memory"), "{table}");
    }

    #[test]
    fn a_missing_value_is_named() {
        for (part, name) in [(Part::Containers, "ours_run"), (Part::Pods, "sandbox_kata")] {
            let error = table(&[part], &Values::new()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
