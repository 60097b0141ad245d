//! The program that the tests run inside containers. It reports what it sees, as JSON, or does one
//! thing and says how it went; it exits with 1 and a message on standard error when that failed.

mod files;
mod limits;
mod load;
mod network;
mod report;
mod unique;
mod volumes;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, thread};

use bulkhead_tests::pattern;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe {arguments:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Outcome {
    match arguments {
        ["report"] => println!("{}", report::report()?),
        ["unique"] => println!("{}", unique::report()?),
        ["load", directory, server] => load::run(directory, server)?,
        ["emit", length] => pattern::write(1, length.parse()?, &mut io::stdout().lock())?,
        ["emit-both", length] => emit_both(length.parse()?)?,
        ["write", file, length] => pattern::write(1, length.parse()?, &mut File::create(file)?)?,
        ["check"] => println!("{} bytes", pattern::check(1, &mut io::stdin().lock())?),
        ["check", file] => println!("{} bytes", pattern::check(1, &mut File::open(file)?)?),
        ["files", directory] => files::exercise(directory.as_ref())?,
        ["entries", directory, count] => files::entries(directory.as_ref(), count.parse()?)?,
        ["errno", what, path] => println!("{}", report::errno_of(what, path)?),
        ["queue", what, key] => println!("{}", report::queue(what, key.parse()?)?),
        ["serve", directory] => volumes::serve(directory.as_ref())?,
        ["ask", directory] => volumes::ask(directory.as_ref())?,
        ["huge", file, pages] => volumes::huge(file.as_ref(), pages.parse()?)?,
        ["watch", directory] => volumes::watch(directory.as_ref())?,
        ["allocate", mib] => allocate(mib.parse()?)?,
        ["bomb"] => limits::bomb()?,
        ["fork", most] => println!("{}", limits::many(most.parse()?)?),
        ["fill", file, mib] => println!("{}", limits::fill(file.as_ref(), mib.parse()?)?),
        ["pin", processor] => println!("{}", limits::pin(processor.parse()?)?),
        ["trap", children] => trap(children.parse()?)?,
        ["count", address] => network::count(address)?,
        ["send", address, length] => network::send(address, length.parse()?)?,
        ["datagram", address, text] => network::datagram(address, text)?,
        ["tun", text] => network::tun(text)?,
        ["tick"] => tick()?,
        ["burn", milliseconds] => burn(Duration::from_millis(milliseconds.parse()?)),
        // As containerd's binary:// logging calls it: the query's keys and values, in order.
        ["out", file] => log_driver(file)?,
        _ => return Err("unknown command".into()),
    }
    Ok(())
}

/// Writes pattern 1 to standard output and pattern 2 to standard error, in turns.
fn emit_both(length: u64) -> Outcome {
    let errors = thread::spawn(move || pattern::write(2, length, &mut io::stderr().lock()));
    pattern::write(1, length, &mut io::stdout().lock())?;
    errors.join().map_err(|_| "the other thread panicked")??;
    Ok(())
}

/// Takes memory and touches every page.
fn allocate(mib: usize) -> Outcome {
    let mut blocks = Vec::new();
    for taken in 1..=mib {
        let mut block = vec![0_u8; 1 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        blocks.push(block);
        if taken % 16 == 0 {
            println!("{taken} MiB");
        }
    }
    println!("all of it");
    Ok(())
}

/// Waits for SIGTERM in this process and in `children` more; each says so, and exits with 7.
fn trap(children: u32) -> Outcome {
    use nix::sys::signal::{SigSet, Signal};
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGTERM);
    wanted.thread_block()?;
    for _ in 0..children {
        // SAFETY: this process has one thread, so the child may do anything.
        if unsafe { libc::fork() } == 0 {
            println!("waiting");
            let signal = wanted.wait()?;
            println!("child got {signal}");
            return Ok(());
        }
    }
    println!("waiting");
    let signal = wanted.wait()?;
    // The children's words come first; without them this waits until the test gives up.
    while nix::sys::wait::wait().is_ok() {}
    println!("init got {signal}");
    std::process::exit(7);
}

fn tick() -> Outcome {
    for count in 0_u64.. {
        println!("tick {count}");
        io::stdout().flush()?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn burn(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// Descriptor 3 is the container's standard output, 4 its standard error; closing 5 says ready.
fn log_driver(file: &str) -> Outcome {
    // containerd sends SIGTERM as soon as the container's streams are closed; what is in the pipes is read first.
    // SAFETY: ignoring a signal runs no code of this program.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
    // SAFETY: the three descriptors are this program's by contract, and nothing else here owns them.
    let (mut out, mut errors, ready) =
        unsafe { (File::from_raw_fd(3), File::from_raw_fd(4), File::from_raw_fd(5)) };
    let mut log = File::create(file)?;
    let names = ["CONTAINER_NAMESPACE", "CONTAINER_ID"].map(|name| env::var(name).unwrap_or_default());
    writeln!(log, "{}", names.join(" "))?;
    drop(ready);
    let errors = thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let mut text = String::new();
    out.read_to_string(&mut text)?;
    write!(
        log,
        "out:{text}err:{}oom_score_adj:{}",
        errors.join().map_err(|_| "the other thread panicked")??,
        std::fs::read_to_string("/proc/self/oom_score_adj")?
    )?;
    Ok(())
}
