//! What a helper process, and the container process it makes, tell the agent over the status pipe.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::JobError;

/// Longest text of a report in bytes. A record must fit into `PIPE_BUF` to be written in one piece.
const MAX_TEXT: usize = 3000;

/// A record in the status pipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Id of the process that was made.
    Pid(u32),
    /// The work failed.
    Failed(String),
    /// libcontainer's own account of an error, innermost first.
    Detail(String),
    /// What was asked for cannot be had.
    Refused(String),
    /// One of the results.
    Item(String),
}

const PID: u8 = b'p';
const FAILED: u8 = b'f';
const DETAIL: u8 = b'd';
const REFUSED: u8 = b'x';
const ITEM: u8 = b'i';

/// The write end of the status pipe.
#[derive(Debug)]
pub struct StatusPipe(OwnedFd);

impl StatusPipe {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Its number, the same in forked children.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Writes a record. There is nobody to tell of an error.
    pub fn send(&self, report: &Report) {
        send_to(self.number(), report);
    }
}

/// Writes a record to the status pipe by its number.
pub fn send_to(fd: RawFd, report: &Report) {
    let record = encode(report);
    // SAFETY: the buffer is valid for reads of its length; a bad descriptor is an error without effect.
    unsafe { libc::write(fd, record.as_ptr().cast(), record.len()) };
}

/// A record: kind, length of the text in two bytes, text.
fn encode(report: &Report) -> Vec<u8> {
    let number;
    let (kind, text) = match report {
        Report::Pid(pid) => {
            number = pid.to_string();
            (PID, &number)
        }
        Report::Failed(text) => (FAILED, text),
        Report::Detail(text) => (DETAIL, text),
        Report::Refused(text) => (REFUSED, text),
        Report::Item(text) => (ITEM, text),
    };
    let bytes = &text.as_bytes()[..text.len().min(MAX_TEXT)];
    let mut record = vec![kind];
    // The text is shorter than 64 KiB.
    record.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    record.extend_from_slice(bytes);
    record
}

/// All complete records.
pub(super) fn parse(mut data: &[u8]) -> Vec<Report> {
    let mut reports = Vec::new();
    while let [kind, low, high, rest @ ..] = data {
        let Some((text, rest)) = rest.split_at_checked(usize::from(u16::from_le_bytes([*low, *high]))) else {
            break;
        };
        data = rest;
        let text = String::from_utf8_lossy(text).into_owned();
        reports.push(match *kind {
            PID => match text.parse() {
                Ok(pid) => Report::Pid(pid),
                Err(_) => break,
            },
            FAILED => Report::Failed(text),
            DETAIL => Report::Detail(text),
            REFUSED => Report::Refused(text),
            ITEM => Report::Item(text),
            _ => break,
        });
    }
    reports
}

/// The error the reports amount to: a refusal if there is one, else the failure with libcontainer's
/// innermost detail, which its error values often lack.
pub(super) fn failure(reports: &[Report]) -> Option<JobError> {
    let mut failed = None;
    let mut detail = None;
    for report in reports {
        match report {
            Report::Refused(text) => return Some(JobError::Refused(text.clone())),
            Report::Failed(text) => failed = failed.or(Some(text)),
            Report::Detail(text) => detail = detail.or(Some(text)),
            Report::Pid(_) | Report::Item(_) => (),
        }
    }
    match (failed, detail) {
        (Some(failed), Some(detail)) if !failed.contains(detail.as_str()) => {
            Some(JobError::Failed(format!("{failed} ({detail})")))
        }
        (Some(text), _) | (None, Some(text)) => Some(JobError::Failed(text.clone())),
        (None, None) => None,
    }
}

/// Sends libcontainer's error log of this process and its children to the status pipe.
pub(super) fn capture_library_errors(status: &StatusPipe) {
    let subscriber = ErrorLog {
        status: status.number(),
        sent: AtomicBool::new(false),
    };
    // Fails only if there is one already, which then is this one.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// A subscriber that forwards the first error of each process and nothing else.
#[derive(Debug)]
struct ErrorLog {
    status: RawFd,
    sent: AtomicBool,
}

impl Subscriber for ErrorLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        // Errors are logged on the way up: the first is the cause, the rest repeat it.
        if self.sent.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        send_to(
            self.status,
            &Report::Detail(format!("{}{}", text.message, text.fields)),
        );
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_report() -> impl Strategy<Value = Report> {
        prop_oneof![
            any::<u32>().prop_map(Report::Pid),
            ".{0,80}".prop_map(Report::Failed),
            ".{0,80}".prop_map(Report::Detail),
            ".{0,80}".prop_map(Report::Refused),
        ]
    }

    proptest! {
        #[test]
        fn records_survive_the_pipe(reports in prop::collection::vec(any_report(), 0..10)) {
            let data: Vec<u8> = reports.iter().flat_map(encode).collect();
            prop_assert_eq!(parse(&data), reports);
        }

        #[test]
        fn any_bytes_parse(data in prop::collection::vec(any::<u8>(), 0..200)) {
            parse(&data);
        }
    }

    #[test]
    fn record_fits_into_one_write() {
        assert!(encode(&Report::Failed("x".repeat(100_000))).len() <= libc::PIPE_BUF);
    }

    #[test]
    fn a_refusal_stands_alone() {
        let reports = [
            Report::Detail("deep".into()),
            Report::Refused("exec: \"x\": not found".into()),
            Report::Failed("outer".into()),
        ];
        let error = failure(&reports);
        assert!(matches!(error, Some(JobError::Refused(text)) if text == "exec: \"x\": not found"));
    }

    #[test]
    fn detail_completes_the_failure() {
        let reports = [
            Report::Detail("ENOENT".into()),
            Report::Detail("later".into()),
            Report::Failed("outer".into()),
        ];
        assert!(matches!(failure(&reports), Some(JobError::Failed(text)) if text == "outer (ENOENT)"));
        assert!(failure(&[Report::Pid(3)]).is_none());
    }
}
