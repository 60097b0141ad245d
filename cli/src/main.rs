//! `bulkhead`: the command line of Bulkhead.

mod check;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs each pod in its own KVM virtual machine.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find out whether a pod can run on this machine, by running a tiny guest
    Check(check::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Check(arguments) => check::main(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("bulkhead: {error:#}");
        ExitCode::FAILURE
    })
}
