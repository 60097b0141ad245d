//! The agent's log: the kernel's ring buffer, whose end the VMM keeps.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Environment variable (set on the kernel command line) that raises the level: `BULKHEAD_LOG=debug`.
const LEVEL_VARIABLE: &str = "BULKHEAD_LOG";

/// Records let through in one window; a loop that fails must not push the kernel's own messages out.
const BURST: u32 = 100;
const WINDOW: Duration = Duration::from_secs(5);

/// Longest record in bytes; the kernel refuses more than about 1000.
const MAX_RECORD: usize = 900;

/// Sends the `log` crate's records to `/dev/kmsg`. Without that device nothing is logged.
pub fn init() {
    let level = std::env::var(LEVEL_VARIABLE)
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::Warn);
    let Ok(device) = File::options().write(true).open("/dev/kmsg") else {
        return;
    };
    let logger = Box::leak(Box::new(Kmsg {
        device,
        window: Mutex::new(Window::new(Instant::now())),
    }));
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

#[derive(Debug)]
struct Kmsg {
    device: File,
    window: Mutex<Window>,
}

impl Log for Kmsg {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let verdict = match self.window.lock() {
            Ok(mut window) => window.admit(Instant::now()),
            Err(_) => return,
        };
        match verdict {
            Verdict::Drop => (),
            Verdict::Write => self.write(&format_record(record.level(), &record.args().to_string())),
            Verdict::WriteAfter(lost) => {
                self.write(&format_record(
                    Level::Warn,
                    &format!("{lost} messages suppressed"),
                ));
                self.write(&format_record(record.level(), &record.args().to_string()));
            }
        }
    }

    fn flush(&self) {}
}

impl Kmsg {
    fn write(&self, line: &str) {
        // A full or absent ring buffer is no reason to fail.
        let _ = (&self.device).write_all(line.as_bytes());
    }
}

/// One record with its syslog priority, cut at a character boundary.
fn format_record(level: Level, text: &str) -> String {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    let mut line = String::new();
    let _ = write!(line, "<{priority}>bulkhead-agent: ");
    for c in text.chars() {
        if line.len() + c.len_utf8() > MAX_RECORD {
            break;
        }
        line.push(if c == '\n' { ' ' } else { c });
    }
    line
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Write,
    WriteAfter(u32),
    Drop,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    count: u32,
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { start: now, count: 0 }
    }

    fn admit(&mut self, now: Instant) -> Verdict {
        if now.duration_since(self.start) >= WINDOW {
            let lost = self.count.saturating_sub(BURST);
            *self = Self { start: now, count: 1 };
            return if lost == 0 {
                Verdict::Write
            } else {
                Verdict::WriteAfter(lost)
            };
        }
        self.count = self.count.saturating_add(1);
        if self.count <= BURST {
            Verdict::Write
        } else {
            Verdict::Drop
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut window = Window::new(start);
        let written = (0..BURST + 7)
            .filter(|_| window.admit(start) == Verdict::Write)
            .count();
        assert_eq!(written, BURST as usize);
        assert_eq!(window.admit(start + WINDOW), Verdict::WriteAfter(7));
        assert_eq!(window.admit(start + WINDOW), Verdict::Write);
    }

    #[test]
    fn record_is_one_short_line() {
        let line = format_record(Level::Error, &"é\n".repeat(2000));
        assert!(line.starts_with("<3>bulkhead-agent: é é"));
        assert!(line.len() <= MAX_RECORD && !line.contains('\n'));
    }
}
