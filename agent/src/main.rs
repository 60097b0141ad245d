//! The guest's `/sbin/init`.
//!
//! No Rust runtime before `main`: it opens `/dev/null` for missing standard descriptors and aborts if it cannot,
//! and PID 1 starts with neither a console nor `/dev`.
#![cfg_attr(not(test), no_main)]

#[cfg(not(test))]
use bulkhead_agent::container::pause;

/// Entered by the C library's start code; never returns while the guest lives.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(argc: libc::c_int, argv: *const *const libc::c_char) -> libc::c_int {
    // SAFETY: the arguments are those of `main`.
    if unsafe { pause::is_asked(argc, argv) } {
        pause::run();
    }
    // SAFETY: sets a disposition that the Rust runtime would have set: a closed stream is an error, not a death.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    bulkhead_agent::run();
    1
}
