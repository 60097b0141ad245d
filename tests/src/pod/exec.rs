//! What becomes of a command in a container.

use std::fmt;

/// A command that was run in a container to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    pub(super) label: String,
    /// What it wrote.
    pub stdout: String,
    /// What it wrote as errors.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Exec {
    /// Its output, if it succeeded.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    #[must_use]
    pub fn text(self) -> String {
        assert_eq!(self.code, 0, "{self}");
        self.stdout
    }

    /// Its output as JSON, if it succeeded.
    ///
    /// # Panics
    /// If it did not, or it is not JSON.
    #[track_caller]
    #[must_use]
    pub fn json(self) -> serde_json::Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

impl fmt::Display for Exec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "[exit {}] {}\n--- stdout\n{}\n--- stderr\n{}",
            self.code, self.label, self.stdout, self.stderr
        )
    }
}
