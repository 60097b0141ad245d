//! Where things are.

use std::path::{Path, PathBuf};

/// The repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// A file or folder of the repository.
#[must_use]
pub fn path(relative: &str) -> PathBuf {
    root().join(relative)
}
