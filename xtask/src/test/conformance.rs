//! The table of `docs/conformance.md`: behaviours, the tests that show them, and how those ended.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, anyhow};

use super::counts::Counts;
use crate::workspace;

/// Behaviours with their tests, in the tests' folder.
const TABLE: &str = "tests/conformance.txt";
/// The page as it is kept.
const PAGE: &str = "docs/conformance.md";
/// The page that the last run of all suites made.
const MADE: &str = "target/integration/conformance.md";

/// How tests ended, by the name of their function: whether they passed in every suite they ran in.
#[derive(Debug, Default)]
pub struct Shown(BTreeMap<String, bool>);

impl Shown {
    /// Takes the lines `test NAME ... ok` of a suite's output, and of the run of those that failed once more.
    pub fn add(&mut self, first: &str, again: Option<&str>) {
        let mut ends = ends(first);
        ends.extend(again.map(self::ends).unwrap_or_default());
        for (name, passed) in ends {
            let so_far = self.0.entry(name).or_insert(true);
            *so_far &= passed;
        }
    }

    /// Makes the page of what was shown, and compares it with the one that is kept.
    ///
    /// # Errors
    /// A file cannot be read or written, or the table is not of the form.
    pub fn check(&self) -> Result<Counts> {
        let read = |path: &str| {
            fs::read_to_string(workspace::path(path)).with_context(|| format!("cannot read {path}"))
        };
        let made = page(&read(TABLE)?, |test| self.0.get(test).copied())
            .map_err(|wrong| anyhow!("{TABLE}: {wrong}"))?;
        fs::write(workspace::path(MADE), &made).with_context(|| format!("cannot write {MADE}"))?;
        let is_kept = made == read(PAGE)?;
        if !is_kept {
            eprintln!("{PAGE} is not what this run has shown: copy {MADE} there, or mend what fails");
        }
        Ok(Counts::of(PAGE, is_kept))
    }
}

fn ends(text: &str) -> BTreeMap<String, bool> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("test "));
    lines
        .filter_map(|line| {
            let (name, end) = line.split_once(" ... ")?;
            let function = name.rsplit("::").next()?;
            Some((function.to_owned(), end == "ok"))
        })
        .collect()
}

/// What tests can show of a behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// It works.
    Works,
    /// It is refused by design.
    Refused,
    /// Nothing: it does not work, or has no test.
    Missing,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row<'a> {
    behaviour: &'a str,
    claim: Claim,
    /// Names of test functions.
    tests: Vec<&'a str>,
    /// Why, or with what difference.
    remark: &'a str,
}

impl Row<'_> {
    fn state(&self, shown: impl Fn(&str) -> Option<bool>) -> State {
        let ends: Vec<_> = self.tests.iter().map(|test| shown(test)).collect();
        match self.claim {
            Claim::Missing => State::Missing,
            _ if ends.contains(&Some(false)) => State::Fails,
            _ if ends.contains(&None) => State::Untried,
            Claim::Works => State::Pass,
            Claim::Refused => State::Refused,
        }
    }
}

/// How a behaviour stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pass,
    Refused,
    Fails,
    /// A test has not run.
    Untried,
    Missing,
}

/// Sections with their rows.
type Table<'a> = Vec<(&'a str, Vec<Row<'a>>)>;

/// Reads the table; the error is the line that is not of the form, and what is wrong with it.
fn parse(text: &str) -> std::result::Result<Table<'_>, String> {
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

fn parse_row(line: &str) -> std::result::Result<Row<'_>, &'static str> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let [behaviour, claim, tests, remark] = cells[..] else {
        return Err("not four cells");
    };
    let claim = match claim {
        "works" => Claim::Works,
        "refused" => Claim::Refused,
        "missing" => Claim::Missing,
        _ => return Err("unknown claim"),
    };
    let tests: Vec<&str> = tests.split_whitespace().collect();
    if tests.is_empty() != (claim == Claim::Missing) {
        return Err("only what is missing has no tests");
    }
    if claim != Claim::Works && remark.is_empty() {
        return Err("no reason");
    }
    Ok(Row {
        behaviour,
        claim,
        tests,
        remark,
    })
}

/// The page made of the table and of how its tests ended; the error is that of [`parse`].
fn page(text: &str, shown: impl Fn(&str) -> Option<bool>) -> std::result::Result<String, String> {
    let table = parse(text)?;
    let mut page = String::from(
        "# Conformance\n\n\
         What Kubernetes and containerd expect of a runtime, and the integration tests that show it. `cargo xtask test` makes this page of\n\
         `tests/conformance.txt` and of how the tests ended, and fails if it is another one: a row passes when its tests have passed in every\n\
         suite they ran in. With `--everything` all of them run with containerd 1.7 and 2.1 and with both ways of making sandboxes; without it\n\
         all run with 2.1 and the `podsandbox` controller, and with the others those of what is done otherwise then.\n",
    );
    for (title, rows) in table {
        let count = |state| rows.iter().filter(|row| row.state(&shown) == state).count();
        let mut counts = vec![
            format!("{} pass", count(State::Pass)),
            format!("{} refused by design", count(State::Refused)),
            format!("{} missing", count(State::Missing)),
        ];
        for (state, what) in [(State::Fails, "fail"), (State::Untried, "untried")] {
            if count(state) > 0 {
                counts.push(format!("{} {what}", count(state)));
            }
        }
        let _ = write!(
            page,
            "\n## {title}\n\n{}.\n\n| behaviour | | shown by | remark |\n|---|---|---|---|\n",
            counts.join(", ")
        );
        for row in &rows {
            let state = match row.state(&shown) {
                State::Pass => "pass",
                State::Refused => "refused by design",
                State::Fails => "fails",
                State::Untried => "untried",
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use super::*;

    fn table() -> String {
        fs::read_to_string(workspace::path(TABLE)).unwrap()
    }

    /// Names of the functions in `source` that are tests.
    fn tests_of(source: &str) -> BTreeSet<String> {
        let after = source.split("#[test]").skip(1);
        after
            .filter_map(|text| text.split_once("fn ")?.1.split('(').next())
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn rows_without_tests_or_reasons_are_refused() {
        for bad in [
            "a | works | | ",
            "a | refused | test | ",
            "a | missing | | ",
            "a | missing | test | why",
            "a | perhaps | test | why",
            "a | works | test",
        ] {
            assert!(parse(&format!("## section\n{bad}")).is_err(), "{bad}");
        }
        assert!(parse("a | works | test | ").is_err());
        let text = "# comment\n## section\na | works | b c | \n";
        assert_eq!(parse(text).unwrap()[0].1[0].tests, ["b", "c"]);
    }

    #[test]
    fn a_row_passes_when_its_tests_do_in_every_suite() {
        let mut shown = Shown::default();
        shown.add("test x::a ... ok\ntest x::b ... ok\ntest x::c ... FAILED\n", None);
        shown.add(
            "test y::a ... ok\ntest y::b ... FAILED\ntest y::d ... FAILED\n",
            Some("test y::d ... ok\n"),
        );
        let text = "## s\na | works | a | \nb | works | a b | \nc | refused | c | why\nd | refused | d a | why\n\
            e | works | a e | \nf | missing | | why\n";
        let table = parse(text).unwrap();
        let states = table[0].1.iter();
        let states: Vec<_> = states
            .map(|row| row.state(|test| shown.0.get(test).copied()))
            .collect();
        let expected = [
            State::Pass,
            State::Fails,
            State::Fails,
            State::Refused,
            State::Untried,
            State::Missing,
        ];
        assert_eq!(states, expected);
        let page = page(text, |test| shown.0.get(test).copied()).unwrap();
        assert!(
            page.contains("\n1 pass, 1 refused by design, 1 missing, 2 fail, 1 untried.\n"),
            "{page}"
        );
        assert!(
            page.contains("| d | refused by design | `d`, `a` | why |\n"),
            "{page}"
        );
    }

    #[test]
    fn the_page_that_is_kept_is_that_of_a_run_in_which_all_tests_pass() {
        let page = page(&table(), |_| Some(true)).unwrap();
        let file = workspace::path(PAGE);
        if std::env::var_os("BULKHEAD_BLESS").is_some() {
            fs::write(&file, &page).unwrap();
        }
        assert!(
            fs::read_to_string(file).unwrap() == page,
            "{PAGE} is old: see {TABLE}"
        );
    }

    #[test]
    fn every_test_of_the_table_exists() {
        let mut found = BTreeSet::new();
        for suite in ["integration", "cri"] {
            let mut folders = vec![workspace::path("tests/tests").join(suite)];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        folders.push(path);
                    } else {
                        found.extend(tests_of(&fs::read_to_string(path).unwrap()));
                    }
                }
            }
        }
        let table = table();
        let named = parse(&table).unwrap();
        let named = named.iter().flat_map(|(_, rows)| rows).flat_map(|row| &row.tests);
        let unknown: Vec<_> = named.filter(|test| !found.contains(**test)).collect();
        assert!(unknown.is_empty(), "no such tests: {unknown:?}");
    }
}
