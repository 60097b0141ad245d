#![allow(clippy::unwrap_used)]

use bulkhead_protocol::agent::{ContainerProcess, IoStat};
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn text_is_one_short_line_that_drives_nothing(raw in "\\PC{0,40}[\\x00-\\x1f\u{7f}-\u{9f}\u{202e}\u{2028}\u{200b}]{0,9}\\PC{0,40}", most in 0usize..60) {
        let text = text(&raw, most);
        prop_assert!(text.chars().count() <= most);
        prop_assert!(!text.chars().any(|c| c.is_control() || is_format(c)), "{text:?}");
    }

    #[test]
    fn the_end_is_the_end(raw in ".{0,40}", most in 1usize..60) {
        let end = end_of(&raw, most);
        prop_assert!(raw.ends_with(end));
        prop_assert_eq!(end.chars().count(), raw.chars().count().min(most));
    }

    #[test]
    fn a_throttle_lets_no_more_than_its_rate_through(pauses in prop::collection::vec(0u64..400, 1..200)) {
        let interval = Duration::from_millis(100);
        let mut throttle = Throttle::new(3, interval);
        let start = Instant::now();
        let mut now = start;
        let (mut passed, mut held_back, mut told) = (0, 0, 0);
        for pause in pauses {
            now += Duration::from_millis(pause);
            match throttle.pass(now) {
                Some(since_last) => {
                    passed += 1;
                    told += since_last;
                }
                None => held_back += 1,
            }
            let earned = (now - start).as_millis() / interval.as_millis();
            prop_assert!(passed <= 3 + earned);
        }
        prop_assert!(told <= held_back);
    }
}

#[test]
fn text_keeps_words_apart_and_letters_of_all_scripts() {
    assert_eq!(text("a\nb\tc\r\u{1b}[31mé\u{202e}漢", 100), "a b c[31mé漢");
    assert_eq!(text("NUL\0 and \u{7f}", 100), "NUL and ");
}

#[test]
fn a_throttle_recovers() {
    let mut throttle = Throttle::new(2, Duration::from_secs(1));
    let start = Instant::now();
    assert_eq!(throttle.pass(start), Some(0));
    assert_eq!(throttle.pass(start), Some(0));
    for _ in 0..5 {
        assert_eq!(throttle.pass(start), None);
    }
    assert_eq!(throttle.pass(start + Duration::from_secs(1)), Some(5));
    assert_eq!(throttle.pass(start + Duration::from_millis(1900)), None);
    assert_eq!(throttle.pass(start + Duration::from_secs(100)), Some(1));
    assert_eq!(throttle.pass(start + Duration::from_secs(100)), Some(0));
    assert_eq!(throttle.pass(start + Duration::from_secs(100)), None);
}

#[test]
fn counters_are_few_and_have_plain_names() {
    let mut stats = ContainerStatsResponse {
        io: vec![IoStat::default(); 100_000],
        cpu: (0..10_000).map(|n| (format!("made_up_{n}"), n)).collect(),
        ..ContainerStatsResponse::default()
    };
    let names = ["anon", "", "a b", "a\n", "é", "usage=\"1\"}"];
    stats.memory_stat = names.iter().map(|name| ((*name).to_owned(), 1)).collect();
    stats.memory_stat.insert("x".repeat(COUNTER_NAME + 1), 1);
    trim_counters(&mut stats);
    assert_eq!((stats.io.len(), stats.cpu.len()), (IO_DEVICES, COUNTERS));
    let mut left: Vec<&str> = stats.memory_stat.keys().map(String::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["", "anon"]);
}

#[test]
fn processes_are_those_the_host_knows() {
    let process = |exec_id: &str| ContainerProcess {
        pid: 7,
        exec_id: exec_id.into(),
        ..ContainerProcess::default()
    };
    let mut list = ListProcessesResponse {
        processes: vec![process(""), process("mine"), process("\n}made up")],
        ..ListProcessesResponse::default()
    };
    list.processes.resize(100_000, process("mine"));
    trim_processes(&mut list, |exec| exec == "mine");
    let execs: Vec<&str> = list.processes[..3].iter().map(|p| p.exec_id.as_str()).collect();
    assert_eq!((execs, list.processes.len()), (vec!["", "mine", ""], PROCESSES));
}
