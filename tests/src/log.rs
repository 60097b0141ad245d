//! The log files that CRI writes: a line each for what a container wrote, `TIME STREAM TAG TEXT`.

/// A line of a container's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, in RFC 3339 with fractions of a second.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the container's line ends here (tag `F`) and not in a later one (tag `P`).
    pub full: bool,
    /// What it wrote.
    pub text: String,
}

/// The lines of a log file.
///
/// # Panics
/// If one is not of the form.
#[must_use]
pub fn parse(text: &str) -> Vec<Line> {
    text.lines()
        .map(|line| parse_line(line).unwrap_or_else(|| panic!("not a line of CRI's log: {line:?}")))
        .collect()
}

fn parse_line(line: &str) -> Option<Line> {
    let mut parts = line.splitn(4, ' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let date = time.get(..11)?.as_bytes();
    let is_time = date[4] == b'-' && date[7] == b'-' && date[10] == b'T' && date[..4].is_ascii();
    if !is_time || !["stdout", "stderr"].contains(&stream) || !["F", "P"].contains(&tag) {
        return None;
    }
    Some(Line {
        time: time.to_owned(),
        stream: stream.to_owned(),
        full: tag == "F",
        text: parts.next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let lines =
            parse("2026-01-02T03:04:05.678901234Z stdout F a b\n2026-01-02T03:04:05.7+01:00 stderr P \n");
        assert_eq!(
            (lines[0].stream.as_str(), lines[0].text.as_str()),
            ("stdout", "a b")
        );
        assert!(lines[0].full && !lines[1].full && lines[1].text.is_empty());
        for bad in [
            "",
            "x",
            "2026-01-02T03:04:05Z stdout X a",
            "yesterday there stdout F a",
        ] {
            assert_eq!(parse_line(bad), None, "{bad}");
        }
    }
}
