//! Log lines in logrus's text form, as containerd's own, to the FIFO it reads.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest message, in bytes: one write of a line below `PIPE_BUF` is never mixed with another.
const MESSAGE_LIMIT: usize = 3500;

struct Logger {
    output: Output,
    /// ` sandbox=ID` or nothing.
    suffix: String,
}

enum Output {
    /// Non-blocking; a line that does not fit is lost, never waited for.
    Fifo(File),
    Stderr,
}

/// Logs to the FIFO `log` in `bundle`; without one, to nowhere.
pub fn to_bundle(bundle: &Path, sandbox: &str, debug: bool) {
    let fifo = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(bundle.join("log"));
    if let Ok(file) = fifo {
        install(
            Logger {
                output: Output::Fifo(file),
                suffix: format!(" sandbox={}", quote(sandbox)),
            },
            debug,
        );
    }
}

/// Logs warnings to standard error.
pub fn to_stderr() {
    install(
        Logger {
            output: Output::Stderr,
            suffix: String::new(),
        },
        false,
    );
    log::set_max_level(LevelFilter::Warn);
}

fn install(logger: Logger, debug: bool) {
    // Fails only if a logger is installed already.
    let _ = log::set_boxed_logger(Box::new(logger));
    log::set_max_level(if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The transport's own messages say in more words what the callers report anyway.
        !metadata.target().starts_with("ttrpc") || metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format_line(
            SystemTime::now(),
            record.level(),
            &record.args().to_string(),
            &self.suffix,
        );
        let _ = match &self.output {
            Output::Fifo(file) => (&mut &*file).write(line.as_bytes()),
            Output::Stderr => std::io::stderr().write(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

fn format_line(time: SystemTime, level: Level, message: &str, suffix: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let mut end = message.len().min(MESSAGE_LIMIT);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!(
        "time=\"{}\" level={level} msg={}{suffix}\n",
        rfc3339(since),
        quote(&message[..end])
    )
}

/// Quoted as logrus does: as it is if it needs none, else as a Go string.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// RFC 3339 in UTC with nanoseconds.
fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since_epoch.subsec_nanos()
    )
}

/// Year, month and day of a day counted from 1970-01-01 (proleptic Gregorian calendar). Years are
/// counted from 1 March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_logrus_text() {
        let time = UNIX_EPOCH + Duration::new(1_795_239_000, 123_000_000);
        assert_eq!(
            format_line(time, Level::Warn, "a \"b\"\nc", " sandbox=x"),
            "time=\"2026-11-21T05:30:00.123000000Z\" level=warning msg=\"a \\\"b\\\"\\nc\" sandbox=x\n"
        );
        assert!(format_line(time, Level::Info, "started", "").ends_with("level=info msg=started\n"));
    }

    #[test]
    fn dates_are_right() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_799, "2000-02-29T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert!(rfc3339(Duration::from_secs(seconds)).starts_with(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_line_is_one_line_below_the_pipe_limit(message in ".{0,6000}") {
            let line = format_line(UNIX_EPOCH, Level::Info, &message, " sandbox=x");
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert!(line.ends_with('\n'));
        }

        #[test]
        fn days_follow_each_other(days in 0u64..200_000) {
            let (a, b) = (civil(days), civil(days + 1));
            prop_assert!(b > a);
            prop_assert!((1..=12).contains(&b.1) && (1..=31).contains(&b.2));
            let next = (a.0, a.1, a.2 + 1) == b || (b.2 == 1 && ((a.0, a.1 + 1) == (b.0, b.1) || (a.0 + 1, 1) == (b.0, b.1)));
            prop_assert!(next, "{:?} then {:?}", a, b);
        }
    }
}
