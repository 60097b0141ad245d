//! Standard streams as containerd names them: FIFOs, `file://` and `binary://`.
//!
//! Descriptors opened here go to the VMM; no byte passes through this process.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_sandbox::{Stdio, Stream};

mod logger;

/// Why a stream cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A file or FIFO cannot be opened.
    #[error("Cannot open {}", .0.display())]
    Open(PathBuf, #[source] std::io::Error),
    /// A directory for a log file cannot be made.
    #[error("Cannot create {}", .0.display())]
    Create(PathBuf, #[source] std::io::Error),
    /// The path is not a FIFO.
    #[error("{} is not a FIFO", .0.display())]
    NotFifo(PathBuf),
    /// The URI is not one this runtime serves.
    #[error("Stream {0} is not supported: a FIFO, file:// or binary:// is")]
    Scheme(String),
    /// The logging program cannot be used.
    #[error("Cannot run the logging program {}", .0.display())]
    Logger(PathBuf, #[source] std::io::Error),
    /// The logging program did not get ready.
    #[error("The logging program {} did not get ready", .0.display())]
    LoggerNotReady(PathBuf),
}

/// Streams of one process as containerd names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// FIFO or empty.
    pub stdin: String,
    /// FIFO, URI or empty.
    pub stdout: String,
    /// FIFO, URI or empty.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Who the streams belong to, for a logging program.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// Container id.
    pub container: &'a str,
    /// containerd namespace.
    pub namespace: &'a str,
}

/// Opens the host ends.
///
/// # Errors
/// [`IoError`]; nothing stays open.
pub async fn open(paths: &Paths, owner: Owner<'_>) -> Result<Stdio, IoError> {
    let mut stdio = Stdio {
        terminal: paths.terminal,
        ..Stdio::default()
    };
    if !paths.stdin.is_empty() {
        stdio.stdin = Some(open_stdin(Path::new(&paths.stdin))?);
    }
    // A terminal has one stream of output.
    let stderr = if paths.terminal { "" } else { paths.stderr.as_str() };
    match target(&paths.stdout)? {
        Target::None => {}
        Target::Fifo(path) => stdio.stdout = Some(open_output(path)?),
        Target::File(path) => stdio.stdout = Some(open_log_file(&path)?),
        Target::Binary { path, arguments } => {
            let streams = logger::start(&path, &arguments, owner).await?;
            stdio.stdout = Some(streams.stdout);
            // The program reads both streams, whatever name stderr has.
            if !paths.terminal {
                stdio.stderr = Some(streams.stderr);
            }
            return Ok(stdio);
        }
    }
    match target(stderr)? {
        Target::None => {}
        Target::Fifo(path) => stdio.stderr = Some(open_output(path)?),
        Target::File(path) => stdio.stderr = Some(open_log_file(&path)?),
        Target::Binary { path, arguments } => {
            let streams = logger::start(&path, &arguments, owner).await?;
            stdio.stderr = Some(streams.stderr);
        }
    }
    Ok(stdio)
}

#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    None,
    Fifo(&'a Path),
    File(PathBuf),
    Binary { path: PathBuf, arguments: Vec<String> },
}

fn target(text: &str) -> Result<Target<'_>, IoError> {
    let unsupported = || IoError::Scheme(text.to_owned());
    if text.is_empty() {
        return Ok(Target::None);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return if text.starts_with('/') {
            Ok(Target::Fifo(Path::new(text)))
        } else {
            Err(unsupported())
        };
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(decode(path).ok_or_else(unsupported)?);
    if !path.is_absolute() {
        return Err(unsupported());
    }
    match scheme {
        "fifo" => Ok(Target::Fifo(Path::new(rest))),
        "file" => Ok(Target::File(path)),
        "binary" => {
            let mut arguments = Vec::new();
            for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                for part in [key, value] {
                    arguments.push(decode(&part.replace('+', " ")).ok_or_else(unsupported)?);
                }
            }
            Ok(Target::Binary { path, arguments })
        }
        _ => Err(unsupported()),
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let value = digit(rest.next()?)? * 16 + digit(rest.next()?)?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

fn open_fifo(path: &Path, write: bool) -> Result<File, IoError> {
    let fail = |error| IoError::Open(path.into(), error);
    let file = OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(fail)?;
    if file.metadata().map_err(fail)?.file_type().is_fifo() {
        Ok(file)
    } else {
        Err(IoError::NotFifo(path.into()))
    }
}

/// The reading end goes to the VMM. The writing end kept here means that no client's departure ends the
/// stream: only CloseIO does, by dropping it. A reading end is kept too, so that a client's late write
/// does not break.
fn open_stdin(path: &Path) -> Result<Stream, IoError> {
    let reader = open_fifo(path, false)?;
    let writer = open_fifo(path, true)?;
    Ok(Stream {
        far_end: reader.into(),
        keeper: Some(Box::new(writer)),
    })
}

/// The writing end goes to the VMM. The reading end kept here means that the pipe does not break while
/// no client reads; it goes when the stream is over, so that clients see the end.
fn open_output(path: &Path) -> Result<Stream, IoError> {
    let reader = open_fifo(path, false)?;
    let writer = open_fifo(path, true)?;
    Ok(Stream {
        far_end: writer.into(),
        keeper: Some(Box::new(reader)),
    })
}

fn open_log_file(path: &Path) -> Result<Stream, IoError> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| IoError::Create(parent.into(), error))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(|error| IoError::Open(path.into(), error))?;
    Ok(Stream {
        far_end: file.into(),
        keeper: None,
    })
}

#[cfg(test)]
mod tests;
