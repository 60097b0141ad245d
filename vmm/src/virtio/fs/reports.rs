//! Tells on standard error which of the guest's files a snapshot loses.
//!
//! The library says so in its log, and nowhere else. The log is off at other times: what the library says about requests a
//! guest could make endless.

use std::io::{self, Write};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines for one snapshot. The guest chooses how many files it knows that have no name.
const MOST_LINES: u32 = 8;

/// Longest line in bytes. The guest chooses names.
const LINE_SIZE: usize = 512;

static REPORTS: Reports = Reports {
    lines: AtomicU32::new(0),
};

struct Reports {
    lines: AtomicU32,
}

/// Does `work`, in which the library writes down or reads what the guest knows, and tells what it warns of.
pub(super) fn tell<T>(work: impl FnOnce() -> T) -> T {
    static INSTALLED: Once = Once::new();
    // A process that has a log already keeps it.
    INSTALLED.call_once(|| drop(log::set_logger(&REPORTS)));
    REPORTS.lines.store(0, Ordering::Relaxed);
    log::set_max_level(LevelFilter::Warn);
    let result = work();
    log::set_max_level(LevelFilter::Off);
    let more = REPORTS.lines.load(Ordering::Relaxed).saturating_sub(MOST_LINES);
    if more > 0 {
        write(&format!("and {more} more lines like these"));
    }
    result
}

impl Log for Reports {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("virtiofsd")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) && self.lines.fetch_add(1, Ordering::Relaxed) < MOST_LINES {
            write(&line(&record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Nothing that a terminal or a log would take for more than text.
fn line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars().flat_map(char::escape_debug) {
        if line.len() + character.len_utf8() > LINE_SIZE {
            line.push_str("...");
            break;
        }
        line.push(character);
    }
    line
}

fn write(line: &str) {
    // Nobody reads it once the sandbox has gone.
    let _ = writeln!(io::stderr(), "shared tree: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_text_and_not_longer_than_the_limit() {
        assert_eq!(line("Inode deleted (/a b)"), "Inode deleted (/a b)");
        assert_eq!(line("a\nb\u{1b}[31m"), "a\\nb\\u{1b}[31m");
        assert_eq!(line(&"\u{e4}".repeat(400)).len(), LINE_SIZE + 3);
    }

    #[test]
    fn the_log_is_on_for_the_work_alone() {
        assert_eq!(tell(|| (log::max_level(), 7)), (LevelFilter::Warn, 7));
        assert_eq!(log::max_level(), LevelFilter::Off);
        let of = |target, level| REPORTS.enabled(&Metadata::builder().target(target).level(level).build());
        assert!(of("virtiofsd::passthrough", Level::Warn));
        assert!(!of("virtiofsd::passthrough", Level::Info));
        assert!(!of("virtio_queue", Level::Error));
    }
}
