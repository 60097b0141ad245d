//! Pods as a kubelet drives them: real containerd by its CRI socket, real CNI plugins, real VMs.
//!
//! Run by `cargo xtask test`, which brings the environment along and repeats the suite with each containerd and each
//! way a sandbox can be made. By hand, on a machine where `bulkhead check` passes:
//!
//! ```text
//! cargo test --release -p bulkhead-tests --test cri --no-run     # prints the program's path
//! BULKHEAD_TEST_IMAGE=busybox.tar PROGRAM --test-threads=1 [FILTER]      # as root
//! ```
//!
//! `BULKHEAD_TEST_HANDLER` is the runtime handler: `kata` (the default), `kata-shim` for containerd's
//! `sandboxer = "shim"`, or `runc` to see what containerd does without us. Tests are written against
//! `bulkhead_tests::pod`; each ends with the check that nothing is left on the host.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use bulkhead_tests::Fixture;

mod cgroup;
mod checkpoint;
mod containers;
mod ends;
mod forward;
mod guest;
mod guest_limits;
mod host_files;
mod host_mounts;
mod interfaces;
mod network;
mod node;
mod nri;
mod resources;
mod sandbox;
mod scale;
mod security;
mod snapshotters;
mod streams;
mod templates;
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

fn pods(name: &'static str) -> Fixture {
    Fixture::for_pods(name, &probe())
}
