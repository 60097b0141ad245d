//! Files and directories that only their owner may change: whoever can write there writes the memory of guests.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file or directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {what} {}", .path.display())]
pub struct FileError {
    /// What was tried.
    what: &'static str,
    /// File or directory.
    path: PathBuf,
    /// Reason.
    #[source]
    error: io::Error,
}

/// For `map_err`: the error of what was tried with `path`.
pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |error| FileError {
        what,
        path: path.into(),
        error,
    }
}

/// Makes a directory and those above it, unless they are there.
///
/// # Errors
/// [`FileError`].
pub(crate) fn make_directory(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("create", path))
}

/// Whether `directory` is this user's and nobody else can change it.
///
/// # Errors
/// [`FileError`]: it is not there.
pub(crate) fn is_private(directory: &Path) -> Result<bool, FileError> {
    let metadata = fs::symlink_metadata(directory).map_err(failed("look at", directory))?;
    let own = metadata.uid() == nix::unistd::geteuid().as_raw();
    Ok(own && metadata.is_dir() && metadata.mode() & 0o022 == 0)
}

/// Makes a file that was not there, for reading and writing.
///
/// # Errors
/// [`FileError`].
pub(crate) fn create(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(failed("create", path))
}

/// Opens a file for reading.
///
/// # Errors
/// [`FileError`].
pub(crate) fn open(path: &Path) -> Result<File, FileError> {
    File::open(path).map_err(failed("open", path))
}
