//! Client of containerd's API: what Bulkhead's command line needs of it to make containers, and gRPC for the tests of CRI.

pub mod client;
pub mod grpc;

pub use client::Client;

/// Messages of containerd's API. See `proto/containerd.proto`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used
)]
#[allow(nonstandard_style, unused)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/containerd.rs"));
}

#[cfg(test)]
mod tests;
