//! Output of several machines on one terminal.

use std::io::{self, Write};

/// Passes output on; with a label line by line, each line behind the label.
pub struct Lines<W: Write> {
    label: Option<String>,
    target: W,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
}

impl<W: Write> Lines<W> {
    /// Writes to `target`.
    pub fn new(label: Option<String>, target: W) -> Self {
        Self {
            label,
            target,
            line: Vec::new(),
        }
    }

    fn put_line(&mut self) -> io::Result<()> {
        // One write for each line, so that two machines do not share one.
        let label = self.label.as_deref().unwrap_or_default();
        let line = [label.as_bytes(), b" | ", &self.line].concat();
        self.line.clear();
        self.target.write_all(&line)
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.label.is_none() {
            return self.target.write(bytes);
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend(piece);
            if piece.ends_with(b"\n") {
                self.put_line()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

impl<W: Write> Drop for Lines<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.line.push(b'\n');
            // Nobody is left who could hear of a failure.
            let _ = self.put_line();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn whole_lines_get_the_label() {
        let mut output = Vec::new();
        let mut lines = Lines::new(Some("a".to_owned()), &mut output);
        for piece in ["on", "e\ntwo\n\nth", "ree"] {
            lines.write_all(piece.as_bytes()).unwrap();
        }
        drop(lines);
        assert_eq!(output, b"a | one\na | two\na | \na | three\n");
    }

    #[test]
    fn without_a_label_nothing_waits_for_the_end_of_a_line() {
        let mut output = Vec::new();
        Lines::new(None, &mut output).write_all(b"on").unwrap();
        assert_eq!(output, b"on");
    }
}
