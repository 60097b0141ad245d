//! Archives that the kernel unpacks as its first root: the "newc" format of cpio. Several can follow one another.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Headers, names and contents start at multiples of this many bytes.
const ALIGNMENT: u64 = 4;

/// An archive being written. Owners are root, times zero; the order is the caller's, or sorted.
pub struct Archive<W> {
    writer: W,
    /// Bytes written.
    length: u64,
    inode: u32,
    /// Directories that are in the archive.
    directories: BTreeSet<Vec<u8>>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(writer: W) -> Self {
        Self {
            writer,
            length: 0,
            inode: 0,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a file and the directories above it.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.parents(path.as_bytes())?;
        self.header(path.as_bytes(), REGULAR | mode, content.len() as u64)?;
        self.write(content)?;
        self.pad()
    }

    /// Adds the file `source` under another name.
    ///
    /// # Errors
    /// It cannot be read, or the archive cannot be written.
    pub fn copy(&mut self, path: &str, mode: u32, source: &Path) -> Result<()> {
        self.parents(path.as_bytes())?;
        self.contents(path.as_bytes(), REGULAR | mode, source)
    }

    /// Adds everything below `source`, sorted, in the place of the root.
    ///
    /// # Errors
    /// Something cannot be read or is not a file, directory or symbolic link, or the archive cannot be written.
    pub fn tree(&mut self, source: &Path) -> Result<()> {
        self.below(source, b"")
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> Result<()> {
        self.header(b"TRAILER!!!", 0, 0)?;
        // The next archive may start anywhere that is a multiple of 4.
        self.pad()?;
        self.writer.flush().context("cannot write an archive")
    }

    fn below(&mut self, directory: &Path, name: &[u8]) -> Result<()> {
        let mut entries = fs::read_dir(directory)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let metadata = entry
                .metadata()
                .with_context(|| format!("cannot look at {}", path.display()))?;
            let mode = metadata.permissions().mode() & 0o7777;
            let mut inner = name.to_vec();
            if !inner.is_empty() {
                inner.push(b'/');
            }
            inner.extend(entry.file_name().as_bytes());
            if metadata.is_dir() {
                self.own_directory(&inner, mode)?;
                self.below(&path, &inner)?;
            } else if metadata.is_symlink() {
                let target =
                    fs::read_link(&path).with_context(|| format!("cannot read {}", path.display()))?;
                let target = target.as_os_str().as_bytes();
                self.header(&inner, SYMLINK | 0o777, target.len() as u64)?;
                self.write(target)?;
                self.pad()?;
            } else if metadata.is_file() {
                self.contents(&inner, REGULAR | mode, &path)?;
            } else {
                bail!("{} is of a kind that has no place in an archive", path.display());
            }
        }
        Ok(())
    }

    fn contents(&mut self, name: &[u8], mode: u32, source: &Path) -> Result<()> {
        let file = File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
        let length = file
            .metadata()
            .with_context(|| format!("cannot look at {}", source.display()))?
            .size();
        self.header(name, mode, length)?;
        let copied = io::copy(&mut io::Read::take(file, length), &mut self.writer)
            .context("cannot write an archive")?;
        ensure!(copied == length, "{} shrank while it was read", source.display());
        self.length += copied;
        self.pad()
    }

    fn parents(&mut self, path: &[u8]) -> Result<()> {
        for (index, byte) in path.iter().enumerate() {
            if *byte == b'/' {
                self.own_directory(&path[..index], 0o755)?;
            }
        }
        Ok(())
    }

    /// Adds one directory, once.
    fn own_directory(&mut self, path: &[u8], mode: u32) -> Result<()> {
        if self.directories.insert(path.to_vec()) {
            self.header(path, DIRECTORY | mode, 0)?;
        }
        Ok(())
    }

    fn header(&mut self, name: &[u8], mode: u32, length: u64) -> Result<()> {
        let length = u32::try_from(length)
            .ok()
            .context("a file is too long for an archive")?;
        self.inode += 1;
        let links = if mode & DIRECTORY == 0 { 1 } else { 2 };
        let name_length = u32::try_from(name.len() + 1).context("a name is too long")?;
        // inode, mode, uid, gid, links, mtime, length, device and special device (major, minor), name's length, checksum
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            length,
            0,
            0,
            0,
            0,
            name_length,
            0,
        ];
        self.write(b"070701")?;
        for field in fields {
            self.write(format!("{field:08X}").as_bytes())?;
        }
        self.write(name)?;
        self.write(b"\0")?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.length += bytes.len() as u64;
        self.writer.write_all(bytes).context("cannot write an archive")
    }

    fn pad(&mut self) -> Result<()> {
        let missing = self.length.next_multiple_of(ALIGNMENT) - self.length;
        self.write(&[0; ALIGNMENT as usize][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::process::{Command, Stdio};

    use super::*;

    /// Unpacks with the `cpio` of busybox or GNU, whichever is there.
    fn unpack(archive: &[u8], directory: &Path) {
        let mut child = Command::new("cpio")
            .args(["-i", "-d", "-m"])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn what_goes_in_comes_out() {
        let scratch = std::env::temp_dir().join(format!("bulkhead-cpio-{}", std::process::id()));
        let (tree, out) = (scratch.join("tree"), scratch.join("out"));
        fs::create_dir_all(tree.join("d/empty")).unwrap();
        fs::create_dir_all(&out).unwrap();
        fs::write(tree.join("d/odd"), b"12345").unwrap();
        fs::set_permissions(tree.join("d/odd"), fs::Permissions::from_mode(0o4710)).unwrap();
        std::os::unix::fs::symlink("d/odd", tree.join("link")).unwrap();

        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.tree(&tree).unwrap();
        archive.file("usr/local/bin/run", 0o755, b"#!/bin/sh\n").unwrap();
        archive.file("usr/local/bin/other", 0o600, b"").unwrap();
        archive.copy("copy", 0o644, &tree.join("d/odd")).unwrap();
        archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        unpack(&bytes, &out);

        assert_eq!(fs::read(out.join("d/odd")).unwrap(), b"12345");
        assert_eq!(
            fs::metadata(out.join("d/odd")).unwrap().permissions().mode() & 0o7777,
            0o4710
        );
        assert!(out.join("d/empty").is_dir());
        assert_eq!(fs::read_link(out.join("link")).unwrap(), Path::new("d/odd"));
        assert_eq!(fs::read(out.join("usr/local/bin/run")).unwrap(), b"#!/bin/sh\n");
        assert_eq!(fs::read(out.join("usr/local/bin/other")).unwrap(), b"");
        assert_eq!(fs::read(out.join("copy")).unwrap(), b"12345");
        fs::remove_dir_all(&scratch).unwrap();
    }
}
