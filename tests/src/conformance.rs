//! The table of `docs/conformance.md`: behaviours, and the tests that show them.

use std::collections::BTreeSet;
use std::fmt::Write;

/// How a behaviour stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Tests show it.
    Pass,
    /// Tests for it are written, and have not been seen to pass.
    Untried,
    /// It is refused by design, and tests show the refusal.
    Refused,
    /// It does not work, or nothing shows that it does.
    Missing,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// What is expected.
    pub behaviour: &'a str,
    /// How it stands.
    pub state: State,
    /// Names of test functions.
    pub tests: Vec<&'a str>,
    /// Why, or with what difference.
    pub remark: &'a str,
}

/// Sections with their rows.
pub type Table<'a> = Vec<(&'a str, Vec<Row<'a>>)>;

/// Reads the table of `tests/conformance.txt`.
///
/// # Errors
/// The line that is not of the form, and what is wrong with it.
pub fn parse(text: &str) -> Result<Table<'_>, String> {
    let mut table = Table::new();
    for line in text.lines().map(str::trim) {
        if let Some(title) = line.strip_prefix("## ") {
            table.push((title, Vec::new()));
        } else if !line.is_empty() && !line.starts_with('#') {
            let row = parse_row(line).map_err(|wrong| format!("{wrong}: {line}"))?;
            table
                .last_mut()
                .ok_or("a row before the first section")?
                .1
                .push(row);
        }
    }
    Ok(table)
}

fn parse_row(line: &str) -> Result<Row<'_>, &'static str> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let [behaviour, state, tests, remark] = cells[..] else {
        return Err("not four cells");
    };
    let state = match state {
        "pass" => State::Pass,
        "untried" => State::Untried,
        "refused" => State::Refused,
        "missing" => State::Missing,
        _ => return Err("unknown state"),
    };
    let tests: Vec<&str> = tests.split_whitespace().collect();
    if tests.is_empty() != (state == State::Missing) {
        return Err("only what is missing has no tests");
    }
    if matches!(state, State::Refused | State::Missing) && remark.is_empty() {
        return Err("no reason");
    }
    Ok(Row {
        behaviour,
        state,
        tests,
        remark,
    })
}

/// The page made of the table.
///
/// # Errors
/// As [`parse`].
pub fn page(text: &str) -> Result<String, String> {
    let table = parse(text)?;
    let mut page = String::from(
        "# Conformance\n\n\
         What Kubernetes and containerd expect of a runtime, and the integration tests that show it. A row passes when its tests\n\
         do; those of an untried row have not been seen to pass yet. `cargo xtask test --integration` runs them with containerd 1.7 and 2.1, and with both ways of making sandboxes.\n\
         This page is made from `tests/conformance.txt`; do not change it by hand.\n",
    );
    for (title, rows) in table {
        let count = |state| rows.iter().filter(|row| row.state == state).count();
        let _ = write!(
            page,
            "\n## {title}\n\n{} pass, {} untried, {} refused by design, {} missing.\n\n\
             | behaviour | | shown by | remark |\n|---|---|---|---|\n",
            count(State::Pass),
            count(State::Untried),
            count(State::Refused),
            count(State::Missing)
        );
        for row in &rows {
            let state = match row.state {
                State::Pass => "pass",
                State::Untried => "untried",
                State::Refused => "refused by design",
                State::Missing => "missing",
            };
            let tests: Vec<String> = row.tests.iter().map(|test| format!("`{test}`")).collect();
            let _ = writeln!(
                page,
                "| {} | {state} | {} | {} |",
                row.behaviour,
                tests.join(", "),
                row.remark
            );
        }
    }
    Ok(page)
}

/// Names of the functions in `source` that are tests.
#[must_use]
pub fn tests_of(source: &str) -> BTreeSet<String> {
    let after = source.split("#[test]").skip(1);
    after
        .filter_map(|text| text.split_once("fn ")?.1.split('(').next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
    }

    fn table() -> String {
        fs::read_to_string(root().join("conformance.txt")).unwrap()
    }

    #[test]
    fn rows_without_tests_or_reasons_are_refused() {
        for bad in [
            "a | pass | | ",
            "a | refused | test | ",
            "a | missing | | ",
            "a | missing | test | why",
            "a | perhaps | test | why",
            "a | pass | test",
        ] {
            assert!(parse(&format!("## section\n{bad}")).is_err(), "{bad}");
        }
        assert!(parse("a | pass | test | ").is_err());
        let text = "# comment\n## section\na | pass | b c | \n";
        assert_eq!(parse(text).unwrap()[0].1[0].tests, ["b", "c"]);
    }

    #[test]
    fn the_conformance_page_is_what_the_table_says() {
        let file = root().join("../docs/conformance.md");
        let page = page(&table()).unwrap();
        if std::env::var_os("BULKHEAD_BLESS").is_some() {
            fs::write(&file, &page).unwrap();
        }
        let found = fs::read_to_string(file).unwrap();
        assert!(
            found == page,
            "docs/conformance.md is old: see tests/conformance.txt"
        );
    }

    #[test]
    fn every_test_of_the_conformance_table_exists() {
        let mut found = BTreeSet::new();
        for suite in ["integration", "cri"] {
            for file in fs::read_dir(root().join("tests").join(suite)).unwrap() {
                found.extend(tests_of(&fs::read_to_string(file.unwrap().path()).unwrap()));
            }
        }
        let table = table();
        let named = parse(&table).unwrap();
        let named = named.iter().flat_map(|(_, rows)| rows).flat_map(|row| &row.tests);
        let unknown: Vec<_> = named.filter(|test| !found.contains(**test)).collect();
        assert!(unknown.is_empty(), "no such tests: {unknown:?}");
    }
}
