//! Messages of Kubernetes' CRI, generated from `proto/cri.proto`.

#[allow(
    clippy::all,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    nonstandard_style,
    unused
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

pub use generated::*;
