//! How many tests ended how, and which of them failed.

use std::fmt;
use std::iter::Sum;
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed, and runs of tests that did not come to their end.
    pub failed: u64,
    /// Tests that were not run.
    pub skipped: u64,
    /// What failed, for the end of a long output.
    pub failures: Vec<String>,
}

impl Counts {
    /// A check with this name counts as one test.
    pub fn of(name: &str, passed: bool) -> Self {
        Self {
            passed: u64::from(passed),
            failed: u64::from(!passed),
            skipped: 0,
            failures: (!passed).then(|| name.to_owned()).into_iter().collect(),
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            writeln!(formatter, "failed: {failure}")?;
        }
        write!(
            formatter,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_named_before_the_counts() {
        let counts: Counts = [
            Counts::of("format", false),
            Counts::of("lints", true),
            Counts {
                skipped: 2,
                ..Counts::default()
            },
        ]
        .into_iter()
        .sum();
        assert_eq!(
            counts.to_string(),
            "failed: format\n1 passed, 1 failed, 2 skipped"
        );
    }
}
