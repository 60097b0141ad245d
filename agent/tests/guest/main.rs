//! Containers, processes and streams of the agent, without a VM: see `harness`.
//!
//! Not libtest: the agent is forked from this process, which must have one thread. Arguments: names of tests.
#![allow(clippy::unwrap_used)]

mod containers;
mod disks;
mod harness;
mod isolation;
mod pod;
mod processes;
mod resume;
mod specs;

use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use harness::Guest;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

type Test = (
    &'static str,
    fn(&mut Guest) -> Pin<Box<dyn Future<Output = ()> + '_>>,
);

macro_rules! tests {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$((stringify!($name), |guest| Box::pin($module::$name(guest)))),*]
    };
}

const TESTS: &[Test] = tests![
    disks::layers_and_volumes,
    disks::freeze_and_thaw,
    resume::next_connection_needs_a_resume,
    resume::refused_requests_change_nothing,
    resume::identity_of_a_fork,
    resume::streams_are_joined_again,
    resume::setup_sent_with_the_resume,
    resume::dials_until_the_host_listens,
    containers::hello_refuses_another_version,
    containers::output_and_status,
    containers::ten_mebibytes_arrive_in_order,
    containers::stdin_until_close,
    containers::failed_creations_leave_nothing,
    containers::removal_in_every_state,
    containers::twenty_at_once_leave_nothing,
    containers::pause_and_resume,
    containers::limits_and_counters,
    containers::out_of_memory_is_told_before_the_exit,
    processes::signals,
    processes::exec_sees_the_container,
    processes::listing_during_starts_and_ends,
    processes::exec_errors_name_the_program,
    processes::terminal_and_resize,
    processes::exits_come_in_order,
    processes::an_orphan_does_not_hold_the_exit,
    processes::terminal_of_an_exec,
    pod::shared_pid_namespace,
    pod::pid_namespace_of_another_container,
    pod::process_one_is_out_of_reach,
    pod::files_for_containers,
    isolation::namespaces_and_names,
    isolation::users_and_capabilities,
    isolation::seccomp_also_for_additional_processes,
    isolation::paths_limits_and_parameters,
    isolation::devices_are_filtered,
    isolation::standard_output_can_be_opened_by_name,
];

fn main() {
    // The agent executes its own program, here this one, as process 1 of a shared pid namespace.
    if std::env::args().eq(["/pause"]) {
        bulkhead_agent::container::pause::run();
    }
    // SAFETY: asks for the user id.
    assert_eq!(unsafe { libc::geteuid() }, 0, "these tests need root");
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS.iter().filter(|(name, _)| chosen(name)) {
        if run(*test) {
            passed += 1;
            println!("test {name} ... ok");
        } else {
            failed += 1;
            println!("test {name} ... FAILED");
        }
    }
    // As libtest says it.
    let result = if failed > 0 { "FAILED" } else { "ok" };
    println!("\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored");
    std::process::exit(i32::from(failed > 0));
}

/// Runs a test in a process of its own.
fn run(test: fn(&mut Guest) -> Pin<Box<dyn Future<Output = ()> + '_>>) -> bool {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None) == Ok(WaitStatus::Exited(child, 0)),
        ForkResult::Child => {
            let started = harness::start();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
                runtime.block_on(async {
                    let mut guest = Guest::connect(started).await;
                    test(&mut guest).await;
                });
            }));
            std::process::exit(i32::from(result.is_err()));
        }
    }
}
