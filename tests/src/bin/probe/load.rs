//! Work on everything a guest has, checked all the time: what a snapshot gets wrong shows here.

use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;

const BLOCK: usize = 64 << 10;
const BLOCKS: u64 = 32;

/// Answers that may be missing in a row. Frames under way are lost with a snapshot, and a datagram with them.
const LOST: u32 = 50;

#[derive(Debug, Default)]
struct Counts {
    disk: AtomicU64,
    network: AtomicU64,
    timers: AtomicU64,
    memory: AtomicU64,
}

/// Works until something is not as it should be, and says how far it is ten times a second. The UDP server at `server`
/// sends back what it gets.
pub fn run(directory: &str, server: &str) -> Outcome {
    let counts = Arc::new(Counts::default());
    let (failed, failure) = std::sync::mpsc::channel();
    let path = format!("{directory}/data");
    let server = server.to_owned();
    type Work = Box<dyn FnOnce(&Counts) -> io::Result<()> + Send>;
    let mut works: Vec<(&str, Work)> = vec![
        ("disk", Box::new(move |counts| disk(&path, counts))),
        ("network", Box::new(move |counts| network(&server, counts))),
    ];
    for _ in 0..2 {
        works.push(("timers", Box::new(timers)));
        works.push(("memory", Box::new(memory)));
    }
    for (name, work) in works {
        let (counts, failed) = (counts.clone(), failed.clone());
        thread::spawn(move || {
            let result = work(&counts);
            let _ = failed.send(format!("{name}: {result:?}"));
        });
    }
    loop {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        println!(
            "disk {} network {} timers {} memory {}",
            load(&counts.disk),
            load(&counts.network),
            load(&counts.timers),
            load(&counts.memory)
        );
        if let Ok(failure) = failure.recv_timeout(Duration::from_millis(100)) {
            println!("failed {failure}");
            return Err(failure.into());
        }
    }
}

fn wrong(what: String) -> io::Error {
    io::Error::other(what)
}

/// Writes blocks that tell their round and place, and reads back what the round before left.
fn disk(path: &str, counts: &Counts) -> io::Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut block = vec![0u8; BLOCK];
    for round in 1u64.. {
        for place in 0..BLOCKS {
            let at = place * BLOCK as u64;
            if round > 1 {
                file.read_exact_at(&mut block, at)?;
                let expected = (round - 1) << 8 | place;
                let words = block.as_chunks::<8>().0;
                if let Some(word) = words.iter().find(|word| u64::from_le_bytes(**word) != expected) {
                    return Err(wrong(format!("block {place} of round {round}: {word:?}")));
                }
            }
            for word in block.as_chunks_mut::<8>().0 {
                *word = (round << 8 | place).to_le_bytes();
            }
            file.write_all_at(&block, at)?;
            counts.disk.fetch_add(1, Ordering::Relaxed);
        }
        file.sync_data()?;
        // What is read next comes from the disk.
        nix::fcntl::posix_fadvise(
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
            0,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        )?;
    }
    Ok(())
}

fn network(server: &str, counts: &Counts) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let mut lost = 0;
    let mut answer = [0; 1024];
    for number in 0u64.. {
        let question = number.to_le_bytes().repeat(64);
        // The interface may just have come back.
        let _ = socket.send(&question);
        loop {
            match socket.recv(&mut answer) {
                // An answer that was late.
                Ok(length) if length == question.len() && answer[..8] != question[..8] => {}
                Ok(length) if answer[..length] == question[..] => {
                    lost = 0;
                    counts.network.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Ok(length) => return Err(wrong(format!("{length} bytes of question {number} came back"))),
                Err(_) if lost < LOST => {
                    lost += 1;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Sleeps, and sees that clocks go on and only forward.
fn timers(counts: &Counts) -> io::Result<()> {
    let nap = Duration::from_millis(5);
    let mut before = Instant::now();
    loop {
        thread::sleep(nap);
        let now = Instant::now();
        let Some(slept) = now.checked_duration_since(before) else {
            return Err(wrong(format!("{now:?} is before {before:?}")));
        };
        // It is not late by more than a snapshot and a restore take on a slow machine.
        if slept < nap || slept > Duration::from_secs(60) {
            return Err(wrong(format!("5 ms took {slept:?}")));
        }
        before = now;
        counts.timers.fetch_add(1, Ordering::Relaxed);
    }
}

/// Changes memory by a rule and sees that it keeps to it; floating point registers take part.
fn memory(counts: &Counts) -> io::Result<()> {
    let mut words = vec![1u64; 1 << 16];
    let mut sum = words.len() as f64;
    for step in 1u64.. {
        for word in &mut words {
            *word += 1;
        }
        sum += words.len() as f64;
        let real: u64 = words.iter().sum();
        if real as f64 != sum || words.iter().any(|word| *word != step + 1) {
            return Err(wrong(format!("step {step}: {real} and {sum}")));
        }
        counts.memory.fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
    }
    Ok(())
}
