//! Answers to `-info` and `-v`.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

/// Mounts of a root file system that containerd (2.2 and later) leaves to this shim.
const ALLOW_MOUNTS: (&str, &str) = ("containerd.io/runtime-allow-mounts", "mkdir/*,format/*,erofs");

/// Description of the runtime.
#[must_use]
pub fn runtime_info() -> RuntimeInfo {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        ..RuntimeVersion::default()
    };
    let (key, value) = ALLOW_MOUNTS;
    RuntimeInfo {
        name: "io.containerd.kata.v2".into(),
        version: Some(version).into(),
        annotations: [(key.to_owned(), value.to_owned())].into(),
        ..RuntimeInfo::default()
    }
}
