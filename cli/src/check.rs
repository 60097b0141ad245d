//! `bulkhead check`: can a pod run on this machine, and if not, why and what helps.

mod artifacts;
mod host;
mod kvm;
mod report;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bulkhead_sandbox::config::Configuration;

use report::Report;

/// Options of `bulkhead check`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Leave out the installed programs and images: judge the machine alone
    #[arg(long)]
    host_only: bool,
    /// Configuration file [default: /etc/bulkhead/config.json if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// KVM device
    #[arg(long, value_name = "FILE", default_value = "/dev/kvm")]
    kvm: PathBuf,
    /// Seconds the tiny guest may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
}

/// Runs the check and prints its report.
///
/// The exit code is 0 if a pod can run, 1 if not.
///
/// # Errors
/// A configuration that is not valid, or a report that cannot be printed.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let configuration =
        Configuration::load(arguments.config.as_deref()).context("Cannot load the configuration")?;
    let mut report = Report::default();
    kvm::check(
        &mut report,
        &arguments.kvm,
        Duration::from_secs(arguments.timeout),
    );
    host::check(&mut report, configuration.memory_mib, &configuration.weaker_jail);
    if !arguments.host_only {
        artifacts::check(&mut report, &configuration);
    }
    let text = if arguments.json {
        report.json()
    } else {
        report.text()
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("Cannot print the report")?;
    Ok(if report.ready() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
