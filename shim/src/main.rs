//! `containerd-shim-kata-v2`: containerd's runtime shim of Bulkhead.
//!
//! containerd runs it as `start` and `delete` for every task. `start` of a pod's first container leaves a
//! server process behind, one per pod, that serves containerd's task API and owns the pod's sandbox.

use std::io::Write;
use std::process::ExitCode;

use bulkhead_sandbox::error::chain;
use protobuf::Message;

mod anchor;
mod args;
mod bootstrap;
mod cri;
mod daemon;
mod delete;
mod events;
mod group;
mod info;
mod io;
mod logging;
mod pod;
mod pod_config;
mod sandbox_service;
mod service;
mod start;
mod stats;
mod status;

use args::Action;

fn main() -> ExitCode {
    #[cfg(feature = "fault-injection")]
    if std::env::args().nth(1).as_deref() == Some("fault-steps") {
        return fault_steps();
    }
    let args = match args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => return fail(&error),
    };
    match args.action {
        // containerd reads standard output and standard error together: nothing else may be printed.
        Action::Start => match start::run(&args) {
            Ok(address) => print(address.as_bytes()),
            Err(error) => fail(&error),
        },
        Action::Delete => {
            logging::to_stderr();
            print(&delete::run(&args).write_to_bytes().unwrap_or_default())
        }
        Action::Info => print(&info::runtime_info().write_to_bytes().unwrap_or_default()),
        Action::Version => print(
            format!(
                "containerd-shim-kata-v2 (Bulkhead) {}\n",
                env!("CARGO_PKG_VERSION")
            )
            .as_bytes(),
        ),
    }
}

/// The steps at which this build can fail, one line each: name, operation, who is there.
#[cfg(feature = "fault-injection")]
fn fault_steps() -> ExitCode {
    let lines = bulkhead_sandbox::fault::Step::ALL
        .iter()
        .map(|step| format!("{} {} {}\n", step.name(), step.operation(), step.when().name()));
    print(lines.collect::<String>().as_bytes())
}

fn print(bytes: &[u8]) -> ExitCode {
    let mut output = std::io::stdout();
    match output.write_all(bytes).and_then(|()| output.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    // containerd puts this into a sentence of its own: no line end.
    eprint!("{}", chain(error));
    ExitCode::FAILURE
}
