//! Built things that are kept: `$XDG_CACHE_HOME/bulkhead/KIND/KEY`, KEY being the hash of everything that goes in.
//!
//! It is always safe to delete the whole directory.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A hash under construction. Each part is hashed with its length, so that no two lists of parts collide.
#[derive(Clone)]
pub struct Key(hmac_sha256::Hash);

impl Key {
    /// A key of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(hmac_sha256::Hash::new())
    }

    /// With one more part.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// With the content of a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.with(content))
    }

    /// The first 64 bits in hexadecimal: enough for a cache.
    #[must_use]
    pub fn text(self) -> String {
        hexadecimal(&self.0.finalize()[..8])
    }
}

/// `bytes` in lower-case hexadecimal.
#[must_use]
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The cache's directory.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("bulkhead"))
}

/// The directory of one kind of thing, made if it is missing.
///
/// # Errors
/// It cannot be made.
pub fn directory(kind: &str) -> Result<PathBuf> {
    let directory = root()?.join(kind);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// The entry `key` of `kind`: found (`on_hit` is called), or built by `build` in the empty directory it is given.
/// Two processes never build the same kind at once, and an entry is complete or not there.
///
/// # Errors
/// `build` fails, or a directory cannot be made.
pub fn entry(
    kind: &str,
    key: &str,
    on_hit: impl FnOnce(),
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let directory = directory(kind)?;
    let entry = directory.join(key);
    if entry.exists() {
        on_hit();
        return Ok(entry);
    }
    let lock = directory.join("lock");
    let lock = File::create(&lock).with_context(|| format!("cannot create {}", lock.display()))?;
    lock.lock().context("cannot lock the cache")?;
    if entry.exists() {
        on_hit();
        return Ok(entry);
    }
    let partial = directory.join(format!("{key}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    build(&partial)?;
    fs::rename(&partial, &entry).with_context(|| format!("cannot create {}", entry.display()))?;
    Ok(entry)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn parts_are_kept_apart() {
        let keys = [
            Key::new().text(),
            Key::new().with("").text(),
            Key::new().with("ab").text(),
            Key::new().with("a").with("b").text(),
            Key::new().with("b").with("a").text(),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert_eq!(key.len(), 16);
            assert!(!keys[..index].contains(key), "{key}");
        }
        assert_eq!(Key::new().with("ab").text(), keys[2]);
    }
}
