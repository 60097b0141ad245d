#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixListener;
use std::process::Command;

use proptest::prelude::*;

use super::*;

fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("bulkhead-journal-{name}-{}", std::process::id()))
}

#[test]
fn everything_recorded_is_undone() {
    let dir = directory("undo");
    let journal = Journal::create(&dir).unwrap();
    let socket = dir.with_extension("sock");
    journal.record(&Entry::Socket { path: socket.clone() }).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let start_time = spawn::start_time(pid).unwrap();
    journal
        .record(&Entry::Process {
            pid,
            start_time,
            role: Role::Vmm,
        })
        .unwrap();
    fs::create_dir(dir.join("shared")).unwrap();
    drop(journal);

    replay(&dir).unwrap();
    assert!(!socket.exists());
    assert!(!dir.exists());
    assert!(!child.wait().unwrap().success());
    // Once more: nothing left to do.
    replay(&dir).unwrap();
}

#[test]
fn a_later_process_with_the_same_id_lives() {
    let dir = directory("reuse");
    let journal = Journal::create(&dir).unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let start_time = spawn::start_time(pid).unwrap() + 1;
    journal
        .record(&Entry::Process {
            pid,
            start_time,
            role: Role::Vmm,
        })
        .unwrap();
    journal.finish().unwrap();
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_line_cut_short_by_a_crash_is_ignored() {
    let dir = directory("cut");
    let journal = Journal::create(&dir).unwrap();
    let entry = Entry::Socket {
        path: "/nonexistent/x".into(),
    };
    journal.record(&entry).unwrap();
    (&*journal.file).write_all(br#"{"acquired":"soc"#).unwrap();
    assert_eq!(read(&dir).unwrap(), [entry]);
    replay(&dir).unwrap();
    assert!(!dir.exists());
}

#[test]
fn a_second_sandbox_of_the_same_name_is_refused() {
    let dir = directory("twice");
    let journal = Journal::create(&dir).unwrap();
    assert!(matches!(Journal::create(&dir), Err(JournalError::Create(..))));
    journal.finish().unwrap();
}

#[test]
fn what_cannot_be_undone_keeps_the_journal() {
    let dir = directory("stay");
    let journal = Journal::create(&dir).unwrap();
    // A directory is not a socket: removing it as a file fails.
    let not_a_socket = dir.join("d");
    fs::create_dir(&not_a_socket).unwrap();
    journal
        .record(&Entry::Socket {
            path: not_a_socket.clone(),
        })
        .unwrap();
    assert!(matches!(replay(&dir), Err(JournalError::Undo(..))));
    assert!(dir.join(FILE).exists());
    fs::remove_dir(not_a_socket).unwrap();
    replay(&dir).unwrap();
}

fn entries() -> impl Strategy<Value = Entry> {
    prop_oneof![
        "/[a-z\n\"]{1,9}".prop_map(|path| Entry::Socket { path: path.into() }),
        "[a-z/ ]{1,9}".prop_map(|path| Entry::Cgroup { path: path.into() }),
        ("/[a-z]{1,9}", any::<u64>(), "[a-z]{1,9}").prop_map(|(namespace, inode, interface)| {
            Entry::Redirection {
                namespace: namespace.into(),
                inode,
                interface,
            }
        }),
        (1..i32::MAX, any::<u64>()).prop_map(|(pid, start_time)| Entry::Process {
            pid,
            start_time,
            role: Role::Logger
        }),
    ]
}

proptest! {
    #[test]
    fn entries_survive_the_file(list in proptest::collection::vec(entries(), 0..12), id in any::<u64>()) {
        let dir = directory(&format!("prop-{id}"));
        let journal = Journal::create(&dir).unwrap();
        for entry in &list {
            journal.record(entry).unwrap();
        }
        let back = read(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        prop_assert_eq!(back, list);
    }
}

#[test]
fn a_sweep_undoes_the_dead_and_leaves_the_living() {
    let parent = directory("sweep");
    let (dead, alive) = (parent.join("dead"), parent.join("alive"));
    let socket = parent.with_extension("sock");
    let journal = Journal::create(&dead).unwrap();
    journal.record(&Entry::Socket { path: socket.clone() }).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    drop(journal);
    let journal = Journal::create(&alive).unwrap();

    // While another one makes a journal nothing is swept.
    let making = lock(&parent, FlockArg::LockShared).unwrap();
    sweep(&parent);
    assert!(dead.exists());
    drop(making);
    sweep(&parent);
    assert!(!dead.exists() && !socket.exists());
    assert!(alive.exists());
    journal.finish().unwrap();
    sweep(&parent);
    fs::remove_dir(&parent).unwrap();
    sweep(&parent);
}

#[test]
fn a_journal_is_taken_over_from_the_dead_only() {
    let dir = directory("take-over");
    take_over(&dir).unwrap();
    let journal = Journal::create(&dir).unwrap();
    let waiting = std::thread::spawn({
        let dir = dir.clone();
        move || take_over(&dir)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(dir.exists() && !waiting.is_finished());
    drop(journal);
    waiting.join().unwrap().unwrap();
    assert!(!dir.exists());
}
