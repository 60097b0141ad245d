//! The rows of the tables, which are data (`xtask/bench/rows.json`), and what is known of their ratios.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::measure::Values;
use super::{Part, ROUNDS};

/// By how much a ratio may be worse than the recorded one.
const TOLERANCE: f64 = 1.05;

/// A table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Its name in the rows.
    pub id: String,
    /// Head of the column that says what a row is.
    pub head: String,
    /// How its values are written.
    pub unit: Unit,
}

/// What values are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Unit {
    /// From microseconds.
    #[serde(rename = "ms")]
    Milliseconds,
    /// From KiB.
    #[serde(rename = "MiB")]
    Mebibytes,
}

/// Which of several measured values counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Take {
    /// The smallest: the repetition that was disturbed least.
    #[default]
    Least,
    /// The middle one, of things that go on at the same time.
    Median,
    /// The greatest.
    Worst,
}

/// One comparison with one peer. Less is better.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Name of its recorded ratio.
    pub id: String,
    /// The part that measures it.
    pub part: Part,
    /// The table it is in.
    pub table: String,
    /// What it is.
    pub what: String,
    /// Names of our values, which are added up.
    pub ours: Vec<String>,
    /// Who the peer is.
    pub peer: String,
    /// Names of the peer's values.
    pub theirs: Vec<String>,
    /// Which of the values counts.
    #[serde(default)]
    pub take: Take,
}

impl Row {
    /// Ours and the peer's value.
    ///
    /// # Errors
    /// One was not measured.
    pub fn sides(&self, values: &Values) -> Result<[Side; 2]> {
        Ok([
            Side::new(&self.ours, self.take, values)?,
            Side::new(&self.theirs, self.take, values)?,
        ])
    }

    /// Our value as a share of the peer's.
    ///
    /// # Errors
    /// One was not measured, or the peer's is zero.
    pub fn ratio(&self, values: &Values) -> Result<f64> {
        let [ours, theirs] = self.sides(values)?;
        ensure!(theirs.sum() > 0, "{} of {} is nothing", self.what, self.peer);
        Ok(ours.sum() as f64 / theirs.sum() as f64)
    }

    /// The greatest ratio that [`ROUNDS`] rounds in a row gave, of as many as there were: the least of nine is one that
    /// three rarely come to.
    ///
    /// # Errors
    /// As [`ratio`](Self::ratio).
    pub fn ratio_to_expect(&self, values: &Values) -> Result<f64> {
        let names = self.ours.iter().chain(&self.theirs);
        let measured: Vec<_> = names.filter_map(|name| values.get_key_value(name)).collect();
        let rounds = measured.iter().map(|(_, all)| all.len()).max().unwrap_or(0);
        let few = ROUNDS as usize;
        if self.take != Take::Least || rounds <= few {
            return self.ratio(values);
        }
        let mut greatest: f64 = 0.0;
        for first in (0..=rounds - few).step_by(few) {
            let some = measured.iter().map(|(name, all)| {
                // What is measured once is the same in all rounds.
                let part = all.get(first..first + few).unwrap_or(all);
                ((*name).clone(), part.to_vec())
            });
            greatest = greatest.max(self.ratio(&some.collect())?);
        }
        Ok(greatest)
    }
}

/// What one side of a row is made of.
#[derive(Debug)]
pub struct Side {
    /// Added up.
    pub parts: Vec<u64>,
    /// All values, if there is one part.
    pub all: Vec<u64>,
}

impl Side {
    fn new(names: &[String], take: Take, values: &Values) -> Result<Self> {
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        for name in names {
            let measured = values
                .get(name)
                .filter(|measured| !measured.is_empty())
                .with_context(|| format!("{name} was not measured"))?;
            parts.push(match take {
                Take::Least => measured.iter().copied().min().unwrap_or(0),
                Take::Median => median(measured),
                Take::Worst => measured.iter().copied().max().unwrap_or(0),
            });
            all.clone_from(measured);
        }
        if names.len() > 1 || take == Take::Worst {
            all.clear();
        }
        Ok(Self { parts, all })
    }

    /// The value.
    pub fn sum(&self) -> u64 {
        self.parts.iter().sum()
    }
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// All tables and rows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// In the order in which they are printed.
    pub tables: Vec<Table>,
    /// Likewise.
    pub rows: Vec<Row>,
}

impl Rows {
    /// Those of the repository.
    ///
    /// # Errors
    /// The file is not valid.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let rows: Self =
            serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", path.display()))?;
        let mut ids = BTreeSet::new();
        for row in &rows.rows {
            ensure!(ids.insert(&row.id), "two rows are called {}", row.id);
            ensure!(
                rows.tables.iter().any(|table| table.id == row.table),
                "row {} is in no table",
                row.id
            );
            ensure!(
                !row.ours.is_empty() && !row.theirs.is_empty(),
                "row {} has no values",
                row.id
            );
        }
        Ok(rows)
    }

    /// Rows of the given parts.
    pub fn of<'a>(&'a self, parts: &'a [Part]) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(|row| parts.contains(&row.part))
    }
}

/// Ratios as they were when somebody was content with them, by the row's id.
#[derive(Debug, Default)]
pub struct Ratios(BTreeMap<String, f64>);

/// What became of the ratios.
#[derive(Debug, Default, PartialEq)]
pub struct Verdict {
    /// Worse by more than is allowed.
    pub worse: Vec<Worse>,
    /// Worth recording: better by as much, or new.
    pub news: Vec<String>,
}

/// A row whose ratio is worse than the recorded one.
#[derive(Debug, PartialEq)]
pub struct Worse {
    /// The row's id.
    pub id: String,
    /// What it is, what its ratio was and is.
    pub text: String,
}

/// What a second measurement says of rows that were worse.
#[derive(Debug, Default, PartialEq)]
pub struct Second {
    /// Worse in both measurements.
    pub worse: Vec<String>,
    /// Worse in the first one only.
    pub noise: Vec<String>,
}

impl Ratios {
    /// Those of a file.
    ///
    /// # Errors
    /// It is not valid, or names a row that does not exist.
    pub fn load(path: &Path, rows: &Rows) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let ratios: BTreeMap<String, f64> =
            serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", path.display()))?;
        for (id, ratio) in &ratios {
            ensure!(rows.rows.iter().any(|row| row.id == *id), "no row is called {id}");
            ensure!(ratio.is_finite() && *ratio > 0.0, "the ratio of {id} is {ratio}");
        }
        Ok(Self(ratios))
    }

    /// These, by the rows' ids.
    #[cfg(test)]
    pub fn of(ratios: &[(&str, f64)]) -> Self {
        Self(
            ratios
                .iter()
                .map(|(id, ratio)| ((*id).to_owned(), *ratio))
                .collect(),
        )
    }

    /// The recorded ratio of a row.
    pub fn get(&self, id: &str) -> Option<f64> {
        self.0.get(id).copied()
    }

    /// Whether a row's ratio is worse than the recorded one by more than is allowed.
    fn is_worse(&self, id: &str, now: f64) -> bool {
        self.get(id).is_some_and(|was| now > was * TOLERANCE)
    }

    /// Compares what was measured with what is recorded.
    ///
    /// # Errors
    /// A value was not measured.
    pub fn judge<'a>(&self, rows: impl Iterator<Item = &'a Row>, values: &Values) -> Result<Verdict> {
        let mut verdict = Verdict::default();
        for row in rows {
            let now = row.ratio(values)?;
            let name = format!("{} ({}, beside {})", row.id, row.what, row.peer);
            let Some(was) = self.get(&row.id) else {
                verdict.news.push(format!("{name}: {now:.3}, not recorded"));
                continue;
            };
            let text = format!(
                "{name}: {now:.3} after {was:.3}, {:+.1} %",
                (now / was - 1.0) * 100.0
            );
            if self.is_worse(&row.id, now) {
                let id = row.id.clone();
                verdict.worse.push(Worse { id, text });
            } else if now * TOLERANCE < was {
                verdict.news.push(text);
            }
        }
        Ok(verdict)
    }

    /// Looks at rows that were worse in the values of another measurement.
    ///
    /// # Errors
    /// A value was not measured.
    pub fn judge_again<'a>(
        &self,
        worse: Vec<Worse>,
        rows: impl Iterator<Item = &'a Row>,
        values: &Values,
    ) -> Result<Second> {
        let rows: BTreeMap<_, _> = rows.map(|row| (row.id.as_str(), row)).collect();
        let mut second = Second::default();
        for Worse { id, text } in worse {
            let row = rows
                .get(id.as_str())
                .with_context(|| format!("no row is called {id}"))?;
            let now = row.ratio(values)?;
            let text = format!("{text}; measured once more: {now:.3}");
            if self.is_worse(&id, now) {
                second.worse.push(text);
            } else {
                second.noise.push(text);
            }
        }
        Ok(second)
    }

    /// Takes over what was measured and forgets rows that do not exist any more.
    ///
    /// # Errors
    /// A value was not measured, or the file cannot be written.
    pub fn record(&self, path: &Path, rows: &Rows, parts: &[Part], values: &Values) -> Result<()> {
        let mut ratios = self.0.clone();
        for row in rows.of(parts) {
            let ratio = (row.ratio_to_expect(values)? * 1000.0).round() / 1000.0;
            ratios.insert(row.id.clone(), ratio);
        }
        ratios.retain(|id, _| rows.rows.iter().any(|row| row.id == *id));
        let text = serde_json::to_string_pretty(&ratios).context("cannot write the ratios")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{ratios_file, rows_file};
    use super::*;

    fn row(id: &str, take: Take) -> Row {
        Row {
            id: id.into(),
            part: Part::Containers,
            table: "t".into(),
            what: "x".into(),
            ours: vec!["a".into()],
            peer: "p".into(),
            theirs: vec!["b".into()],
            take,
        }
    }

    /// Ours, and 1,000 for the peer.
    fn values(ours: &[u64]) -> Values {
        Values::from([("a".to_owned(), ours.to_vec()), ("b".to_owned(), vec![1000])])
    }

    #[test]
    fn the_repositorys_rows_and_ratios_fit() {
        let rows = Rows::load(&rows_file()).unwrap();
        Ratios::load(&ratios_file(), &rows).unwrap();
        for part in [Part::Containers, Part::Pods, Part::Parallel, Part::Io] {
            assert!(rows.of(&[part]).count() > 0, "{part:?} has no rows");
        }
    }

    #[test]
    fn worse_by_more_than_a_twentieth_is_told() {
        let rows = [
            row("even", Take::Least),
            row("worst", Take::Worst),
            row("new", Take::Median),
        ];
        let ratios = Ratios::of(&[("even", 1.0), ("worst", 1.0)]);
        let judge = |ours: &[u64]| ratios.judge(rows.iter(), &values(ours)).unwrap();
        let verdict = judge(&[1000, 1050, 1050]);
        assert_eq!(verdict.worse, []);
        assert_eq!(verdict.news, ["new (x, beside p): 1.050, not recorded"]);
        let verdict = judge(&[1000, 1000, 1060]);
        assert_eq!(verdict.worse.len(), 1);
        assert_eq!(
            verdict.worse[0].text,
            "worst (x, beside p): 1.060 after 1.000, +6.0 %"
        );
        let verdict = judge(&[1051, 1051, 1051]);
        assert_eq!(verdict.worse.len(), 2);
        let verdict = judge(&[900]);
        assert!(verdict.worse.is_empty() && verdict.news.len() == 3, "{verdict:?}");
        assert!(ratios.judge(rows.iter(), &Values::new()).is_err());
    }

    #[test]
    fn only_what_is_worse_twice_is_worse() {
        let rows = [row("least", Take::Least), row("worst", Take::Worst)];
        let ratios = Ratios::of(&[("least", 1.0), ("worst", 1.0)]);
        let twice = |first: &[u64], second: &[u64]| {
            let worse = ratios.judge(rows.iter(), &values(first)).unwrap().worse;
            ratios.judge_again(worse, rows.iter(), &values(second)).unwrap()
        };
        let second = twice(&[1100, 1200], &[1040, 1300]);
        assert_eq!(
            second.worse,
            ["worst (x, beside p): 1.200 after 1.000, +20.0 %; measured once more: 1.300"]
        );
        assert_eq!(
            second.noise,
            ["least (x, beside p): 1.100 after 1.000, +10.0 %; measured once more: 1.040"]
        );
        // What is worse in the second measurement alone was good once.
        assert_eq!(twice(&[1000], &[2000]), Second::default());
        let worse = ratios.judge(rows.iter(), &values(&[2000])).unwrap().worse;
        assert!(ratios.judge_again(worse, rows.iter(), &Values::new()).is_err());
    }

    #[test]
    fn repetitions_count_by_their_least_and_others_by_their_middle() {
        let values = values(&[3000, 1000, 2000]);
        let of = |take| row("a", take).ratio(&values).unwrap();
        assert_eq!(
            [of(Take::Least), of(Take::Median), of(Take::Worst)],
            [1.0, 2.0, 3.0]
        );
    }

    #[test]
    fn records_replace_what_was_measured_only() {
        let path = std::env::temp_dir().join(format!("bulkhead-ratios-{}.json", std::process::id()));
        let rows = Rows {
            tables: Vec::new(),
            rows: vec![
                row("a", Take::Least),
                Row {
                    part: Part::Pods,
                    ..row("b", Take::Least)
                },
            ],
        };
        let old = Ratios::of(&[("a", 9.0), ("b", 2.0), ("gone", 1.0)]);
        let values = Values::from([("a".to_owned(), vec![1]), ("b".to_owned(), vec![3])]);
        old.record(&path, &rows, &[Part::Containers], &values).unwrap();
        let new = Ratios::load(&path, &rows).unwrap();
        assert_eq!(
            (new.get("a"), new.get("b"), new.0.len()),
            (Some(0.333), Some(2.0), 2)
        );
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn of_many_rounds_the_worst_three_in_a_row_are_recorded() {
        let values = |ours: &[u64], theirs: &[u64]| {
            Values::from([("a".to_owned(), ours.to_vec()), ("b".to_owned(), theirs.to_vec())])
        };
        let expect = |ours: &[u64], theirs: &[u64], take| {
            row("x", take).ratio_to_expect(&values(ours, theirs)).unwrap()
        };
        let nine = [50, 60, 70, 65, 62, 61, 80, 55, 90];
        assert_eq!(expect(&nine, &[100; 9], Take::Least), 0.61);
        assert_eq!(expect(&nine[..3], &[100; 3], Take::Least), 0.5);
        // Three that are not whole are left out, and what is measured once counts in all.
        assert_eq!(expect(&nine[..5], &[100; 5], Take::Least), 0.5);
        assert_eq!(expect(&nine, &[100], Take::Least), 0.61);
        assert_eq!(expect(&nine, &[100; 9], Take::Worst), 0.9);
        assert!(
            row("x", Take::Least)
                .ratio_to_expect(&values(&nine, &[]))
                .is_err()
        );
    }

    #[test]
    fn several_values_are_added_up() {
        let values = Values::from([("a".to_owned(), vec![1, 2, 9]), ("b".to_owned(), vec![10])]);
        let side = Side::new(&["a".into(), "b".into()], Take::Median, &values).unwrap();
        assert_eq!((side.sum(), side.all.len()), (12, 0));
        let error = Side::new(&["c".into()], Take::Median, &values).unwrap_err();
        assert_eq!(error.to_string(), "c was not measured");
    }
}
