//! What a guest, and a VMM that was taken over by one, can make this process spend and write: sizes, times and rates,
//! all in one place.

use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{ContainerStatsResponse, ListProcessesResponse};

#[cfg(test)]
mod tests;

/// Largest answer of the agent in bytes. The largest honest one is a list of some ten thousand processes.
pub const REPLY_BYTES: u32 = 1 << 20;

/// Largest event of the agent in bytes: two ids and three numbers.
pub const EVENT_BYTES: u32 = 4 << 10;

/// Events that may wait to be handled; no more is read from the agent meanwhile.
pub const EVENT_BACKLOG: usize = 1024;

/// How long one message of the agent may take from its first byte to its last, and how long a full backlog may stay.
pub const MESSAGE_TIME: Duration = Duration::from_secs(10);

/// How long the agent may take over a signal. One that has not answered a SIGKILL by then loses its VM.
pub const SIGNAL_TIME: Duration = Duration::from_secs(30);

/// How long a VMM that was killed may take to end.
pub const KILL_TIME: Duration = Duration::from_secs(5);

/// How long the agent may take over a question that containerd asks about every container in turn.
pub const QUERY_TIME: Duration = Duration::from_secs(5);

/// The same, for an agent that has let the question before time out: other pods wait for this one's turn to pass.
pub const LATE_QUERY_TIME: Duration = Duration::from_millis(100);

/// Events of a container's memory running out that are told in a row, and the pause in which one more may come.
pub const OOM_EVENTS: u32 = 8;
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// How long the VMM may take over a request. It owes an answer whatever the guest does.
pub const VMM_TIME: Duration = Duration::from_secs(30);

/// How long a guest's file systems stay frozen at most while its pod is saved: all of its disks are copied meanwhile. The
/// agent thaws them then.
pub const FREEZE_TIME: Duration = Duration::from_secs(300);

/// How long the VMM may take to show the guest's console for an error.
pub const CONSOLE_TIME: Duration = Duration::from_secs(1);

/// How long work may take that only the host's kernel can hold up: writing limits of a cgroup, removing mounts.
pub const HOST_TIME: Duration = Duration::from_secs(30);

/// Longest text of the guest or the VMM in an error or in the log, in characters.
pub const TEXT: usize = 1024;

/// Longest end of a console in an error, in characters.
pub const CONSOLE: usize = 4096;

/// Most processes of a container that are listed: the kernel's default `pid_max`.
pub const PROCESSES: usize = 32768;

/// Most block devices in a container's counters; a guest has 16 slots.
pub const IO_DEVICES: usize = 64;

/// Most counters of one kind; `memory.stat` has about 60.
pub const COUNTERS: usize = 256;

/// Longest name of a counter in bytes.
pub const COUNTER_NAME: usize = 64;

/// Bytes of a VMM's list of written memory: 16 for each of the pages that a guest is given at once, 16 MiB of them.
pub const WRITTEN: usize = 64 << 10;

/// Text of the guest or the VMM for a log or an error: at most `most` characters, on one line, with nothing that
/// drives a terminal or changes the order of what is read.
#[must_use]
pub fn text(raw: &str, most: usize) -> String {
    let visible = raw.chars().filter_map(|c| match c {
        '\n' | '\t' => Some(' '),
        c if c.is_control() || is_format(c) => None,
        c => Some(c),
    });
    visible.take(most).collect()
}

/// The last `most` characters of a text.
#[must_use]
pub fn end_of(text: &str, most: usize) -> &str {
    let begin = text.char_indices().rev().nth(most.saturating_sub(1));
    begin.map_or(text, |(begin, _)| &text[begin..])
}

/// Characters that change how others are shown (general category Cf), and the separators of lines and paragraphs.
fn is_format(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

/// Drops from a container's counters what an honest agent does not send.
pub fn trim_counters(stats: &mut ContainerStatsResponse) {
    stats.io.truncate(IO_DEVICES);
    for counters in [&mut stats.cpu, &mut stats.memory_stat, &mut stats.memory_events] {
        let mut kept = 0;
        counters.retain(|name, _| {
            let plain =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_.".contains(&byte);
            let keep = kept < COUNTERS && name.len() <= COUNTER_NAME && name.bytes().all(plain);
            kept += usize::from(keep);
            keep
        });
    }
}

/// Drops from a container's processes those above [`PROCESSES`], and the exec ids that the host has not given.
pub fn trim_processes(list: &mut ListProcessesResponse, is_known: impl Fn(&str) -> bool) {
    list.processes.truncate(PROCESSES);
    for process in &mut list.processes {
        if !is_known(&process.exec_id) {
            process.exec_id = String::new();
        }
    }
}

/// For the events of one container.
#[must_use]
pub fn out_of_memory() -> Throttle {
    Throttle::new(OOM_EVENTS, OOM_INTERVAL)
}

/// Lets so many through in a row, then so many a second.
#[derive(Clone, Debug)]
pub struct Throttle {
    burst: u32,
    interval: Duration,
    left: u32,
    since: Option<Instant>,
    held_back: u64,
}

impl Throttle {
    /// `burst` in a row, then one for each `interval`.
    #[must_use]
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            left: burst,
            since: None,
            held_back: 0,
        }
    }

    /// Whether one may pass at `now`; if so, how many were held back since the last that did.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let nanos = self.interval.as_nanos().max(1);
        let earned = now.saturating_duration_since(since).as_nanos() / nanos;
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(self.burst);
            self.since = Some(since + self.interval.saturating_mul(earned).min(now - since));
        }
        if self.left == 0 {
            self.held_back = self.held_back.saturating_add(1);
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.held_back))
    }
}
