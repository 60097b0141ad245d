//! `bulkhead`: the command line of Bulkhead.

mod begin;
mod check;
#[cfg(test)]
mod fake;
mod fork;
mod pods;
mod records;
mod restore;
mod snapshot;
mod timeline;

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
    /// Start new pods that go on where a running one is
    Fork(fork::Arguments),
    /// Start a new pod that goes on where a saved one was
    Restore(restore::Arguments),
    /// Save a running pod, so that others can begin where it is
    Snapshot(snapshot::Arguments),
    /// Show where the time of a pod's start went
    Timeline(timeline::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Check(arguments) => check::main(&arguments),
        Command::Fork(arguments) => fork::main(&arguments),
        Command::Restore(arguments) => restore::main(&arguments),
        Command::Snapshot(arguments) => snapshot::main(&arguments),
        Command::Timeline(arguments) => timeline::main(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("bulkhead: {error:#}");
        ExitCode::FAILURE
    })
}
