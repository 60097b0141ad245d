//! The end of a guest's console, as it appears in errors.

use crate::limits;

/// Most lines shown.
const LINES: usize = 12;

/// The last lines of `console` on one line, without control characters; empty if there are none.
///
/// The text comes from the guest: it must not be able to forge log lines or drive a terminal.
#[must_use]
pub fn tail(console: &str) -> String {
    let lines: Vec<&str> = console
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let first = lines.len().saturating_sub(LINES);
    let mut text = String::new();
    for line in &lines[first..] {
        if !text.is_empty() {
            text.push_str(" | ");
        }
        text.push_str(&limits::text(line, limits::CONSOLE));
    }
    limits::end_of(&text, limits::CONSOLE).to_owned()
}

#[cfg(test)]
mod tests {
    use super::tail;

    #[test]
    fn keeps_the_last_lines_without_control_characters() {
        assert_eq!(tail(""), "");
        assert_eq!(tail("a\r\n\n\x1b[1mb\n"), "a | [1mb");
        assert_eq!(tail("\u{202e}evil\0\n"), "evil");
        let long = "x".repeat(100_000) + "end\n";
        let shown = tail(&long.repeat(20));
        assert_eq!(shown.chars().count(), crate::limits::CONSOLE);
        let many: String = (0..40).map(|n| format!("{n}\n")).collect();
        assert!(tail(&many).starts_with("28 | "));
        assert!(tail(&many).ends_with(" | 39"));
    }
}
