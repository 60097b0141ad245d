//! Build automation of Bulkhead: `cargo xtask --help`.

mod bench;
mod cache;
mod cargo;
mod demo;
mod fuzz;
mod here;
mod host;
mod image;
mod kernel;
mod kvm;
mod packages;
mod process;
mod progress;
mod rootfs;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::progress::Progress;

/// Builds, shows and tests Bulkhead.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the guest kernel and print its path (BULKHEAD_KERNEL=FILE: use that one)
    Kernel,
    /// Build the guest's root image and print its path
    Rootfs,
    /// Run a command in the emulated host, with the artifacts installed
    Host(host::Arguments),
    /// Run a container in a virtual machine and show how long each phase took
    Demo(demo::Arguments),
    /// Run the unit, property and integration tests
    Test(test::Arguments),
    /// Run the fuzz targets
    Fuzz(fuzz::Arguments),
    /// Measure starts and memory beside the peers, in counted instructions
    Bench(bench::Arguments),
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Kernel => {
            println!("{}", kernel::build(&Progress::new(1))?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Rootfs => {
            println!("{}", rootfs::build(&Progress::new(2))?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Host(arguments) => host::main(arguments),
        Command::Demo(arguments) => demo::main(arguments),
        Command::Test(arguments) => test::main(arguments),
        Command::Fuzz(arguments) => fuzz::main(arguments),
        Command::Bench(arguments) => bench::main(arguments),
    }
}

fn main() -> ExitCode {
    run(&Arguments::parse().command).unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
