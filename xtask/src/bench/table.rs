//! The values as tables in Markdown.

use std::fmt::Write as _;

use anyhow::Result;

use super::Part;
use super::measure::Values;
use super::rows::{Ratios, Rows, Side, Unit};

/// The tables of what was measured.
///
/// # Errors
/// A value of one of `parts` is missing.
pub fn table(rows: &Rows, parts: &[Part], values: &Values, ratios: &Ratios) -> Result<String> {
    let mut tables = Vec::new();
    for table in &rows.tables {
        let mut text = format!(
            "| {} | Bulkhead | peer | ratio | recorded |\n|---|---|---|---|---|\n",
            table.head
        );
        let mut any = false;
        for row in rows.of(parts).filter(|row| row.table == table.id) {
            any = true;
            let [ours, theirs] = row.sides(values)?;
            let recorded = ratios
                .get(&row.id)
                .map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
            let _ = writeln!(
                text,
                "| {} | {} | {} {} | {:.2} | {recorded} |",
                row.what,
                side(&ours, table.unit),
                row.peer,
                side(&theirs, table.unit),
                row.ratio(values)?
            );
        }
        if any {
            tables.push(text);
        }
    }
    Ok(tables.join("\n"))
}

/// `500.0 (600.0, 500.0, 520.0)`, or `1.0 + 9.0 = 10.0`.
fn side(side: &Side, unit: Unit) -> String {
    let written = |value: u64| match unit {
        Unit::Milliseconds => format!("{:.1}", value as f64 / 1000.0),
        Unit::Mebibytes => format!("{:.1}", value as f64 / 1024.0),
    };
    let list = |values: &[u64], between: &str| -> String {
        let values: Vec<_> = values.iter().map(|value| written(*value)).collect();
        values.join(between)
    };
    if side.parts.len() > 1 {
        return format!("{} = {}", list(&side.parts, " + "), written(side.sum()));
    }
    // Of many starts at once the single ones say nothing.
    if side.all.is_empty() || side.all.len() > 9 {
        return written(side.sum());
    }
    format!("{} ({})", written(side.sum()), list(&side.all, ", "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::rows_file;
    use super::*;

    fn values(list: &[(&str, &[u64])]) -> Values {
        list.iter()
            .map(|(name, values)| ((*name).to_owned(), values.to_vec()))
            .collect()
    }

    fn of(parts: &[Part], values: &Values) -> Result<String> {
        table(
            &Rows::load(&rows_file()).unwrap(),
            parts,
            values,
            &Ratios::default(),
        )
    }

    #[test]
    fn values_of_containers_become_tables() {
        let values = values(&[
            ("ours_run", &[600_000, 500_000, 520_000]),
            ("runc_run", &[400_000]),
            ("crun_run", &[260_000, 250_000]),
            ("runsc_run", &[1_040_000]),
            ("qemu_boot", &[200_000]),
            ("cold_run", &[440_000]),
            ("cold_agent_ready", &[100_000]),
            ("template_agent_ready", &[5_000]),
            ("cold_shim_pss", &[1024]),
            ("cold_vmm_pss", &[19456]),
            ("cold_vmm_own_pss", &[1024]),
            ("fork_ten", &[900_000]),
            ("restore_one", &[90_000]),
            ("ours_boot", &[100_000]),
            ("ours_shim_pss", &[1024]),
            ("ours_vmm_pss", &[9216]),
            ("runc_shim_pss", &[10240]),
            ("runc_process_pss", &[0]),
        ]);
        let table = of(&[Part::Containers], &values).unwrap();
        for row in [
            "| 500.0 (600.0, 500.0, 520.0) | runc 400.0 (400.0) | 1.25 | – |",
            "| crun 250.0 (260.0, 250.0) | 2.00 |",
            "| 440.0 (440.0) | runc 400.0 (400.0) | 1.10 |",
            "| 5.0 (5.0) | Bulkhead, cold 100.0 (100.0) | 0.05 |",
            "| QEMU microvm 200.0 (200.0) | 0.50 |",
            "| 900.0 (900.0) | one `bulkhead restore` 90.0 (90.0) | 10.00 |",
            "| 1.0 (1.0) | the VMM with its guest 19.0 (19.0) | 0.05 |",
            "1.0 + 19.0 = 20.0 | runc 10.0 + 0.0 = 10.0 | 2.00 |",
            "1.0 + 9.0 = 10.0 | runc 10.0 + 0.0 = 10.0 | 1.00 |",
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
        let table = of(&[Part::Pods], &values).unwrap();
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
    fn the_worst_of_many_stands_alone() {
        let many: Vec<u64> = (1..=10).map(|value| value * 1000).collect();
        let all = side(
            &Side {
                parts: vec![5000],
                all: many,
            },
            Unit::Milliseconds,
        );
        assert_eq!(all, "5.0");
    }

    #[test]
    fn a_missing_value_is_named() {
        for (part, name) in [(Part::Containers, "ours_run"), (Part::Pods, "sandbox_kata")] {
            let error = of(&[part], &Values::new()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
