//! Goes over limits.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{ForkResult, Pid, fork};

use super::Outcome;

/// Forks for ever, in every process.
pub fn bomb() -> Outcome {
    println!("bombing");
    std::io::stdout().flush()?;
    loop {
        // SAFETY: this process has one thread, so the child may do anything.
        if unsafe { fork() }.is_err() {
            // As many as there can be. The others would have the processor for themselves otherwise.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Starts up to `most` processes that wait; how many there are, and why not more.
pub fn many(most: u32) -> Result<String, Errno> {
    for number in 0..most {
        // SAFETY: as above.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                // Nobody waits for more output.
                for descriptor in 0..3 {
                    let _ = nix::unistd::close(descriptor);
                }
                thread::sleep(Duration::from_secs(1000));
                std::process::exit(0);
            }
            Ok(ForkResult::Parent { .. }) => {}
            Err(errno) => return Ok(format!("{number} {errno:?}")),
        }
    }
    Ok(format!("{most} ok"))
}

/// Writes up to so many MiB to a file and to its disk; how many there are, and why not more.
pub fn fill(file: &Path, mib: u32) -> std::io::Result<String> {
    let mut output = File::create(file)?;
    let block = vec![0x5a; 1 << 20];
    for number in 0..mib {
        if let Err(error) = output.write_all(&block).and_then(|()| output.sync_data()) {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
            return Ok(format!("{number} {errno:?}"));
        }
    }
    Ok(format!("{mib} ok"))
}

/// Asks to run on one processor only.
pub fn pin(processor: usize) -> Result<String, Errno> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    Ok(match sched_setaffinity(Pid::from_raw(0), &set) {
        Ok(()) => "ok".into(),
        Err(errno) => format!("{errno:?}"),
    })
}
