//! Bulkhead as containerd's clients see it: real containerd, driven by `ctr`, real VMs.
//!
//! Run by `cargo xtask test` (`make test`), which brings the environment along and repeats the suite with
//! each containerd. By hand, on a machine where `bulkhead check` passes:
//!
//! ```text
//! cargo test --release -p bulkhead-tests --test integration --no-run     # prints the program's path
//! BULKHEAD_TEST_IMAGE=busybox.tar PROGRAM --test-threads=1 [FILTER]      # as root
//! ```
//!
//! `bulkhead_tests::Config` lists the other variables. The program is static and needs nothing of the
//! repository but `bulkhead-probe`, which it runs inside containers: the two may be copied elsewhere side by
//! side. It starts a containerd of its own.
//! Each test checks at its end that nothing is left on the host: no process, mount, cgroup, link, file,
//! loop device or descriptor.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use bulkhead_tests::Fixture;

mod bad_input;
mod calls;
mod checkpoint;
mod crash;
mod events;
mod failure;
mod faults;
mod files;
mod isolation;
mod jail;
mod layers;
mod logging;
mod network;
mod pods;
mod process;
mod resources;
mod restore;
mod sandbox_api;
mod scale;
mod snapshot;
mod snapshotters;
mod soak;
mod specification;
mod streams;
mod task;
mod templates;
mod vmm;
mod volumes;

/// The probe: beside this program, or where the build left it.
fn probe() -> PathBuf {
    let beside = std::env::current_exe().unwrap().with_file_name("bulkhead-probe");
    if beside.exists() {
        beside
    } else {
        env!("CARGO_BIN_EXE_bulkhead-probe").into()
    }
}

fn fixture(name: &'static str) -> Fixture {
    Fixture::new(name, &probe())
}
