//! Programs of Debian that starts are compared with and the emulated host does not have otherwise.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::host::debian;
use crate::packages;
use crate::progress::Progress;

/// Package and program of each.
const PROGRAMS: [(&str, &str); 2] = [("runsc", "usr/bin/runsc"), ("virtiofsd", "usr/libexec/virtiofsd")];

/// The programs, which need no library that the host has not.
#[derive(Debug)]
pub struct Peers(PathBuf);

impl Peers {
    /// Downloads and unpacks unless cached.
    ///
    /// # Errors
    /// Packages are missing or cannot be unpacked.
    pub fn build(progress: &Progress) -> Result<Self> {
        progress.step("peers of the benchmark", |step| {
            packages::ensure(packages::HOST)?;
            let key = Key::new()
                .with(include_str!("peers.rs"))
                .with(include_str!("../host/debian.rs"))
                .text();
            let made = cache::entry(
                "peers",
                &key,
                || step.cached(),
                |directory| {
                    let root = directory.join("root");
                    debian::unpack(debian::STABLE, &PROGRAMS.map(|(package, _)| package), &root)?;
                    for (_, program) in PROGRAMS {
                        let to = directory.join(program);
                        let parent = to.parent().context("a program lies in a directory")?;
                        fs::create_dir_all(parent)
                            .with_context(|| format!("cannot create {}", parent.display()))?;
                        fs::rename(root.join(program), &to)
                            .with_context(|| format!("the package has no {program}"))?;
                    }
                    fs::remove_dir_all(&root).context("cannot remove what is not needed")
                },
            );
            made.map(Self)
        })
    }

    /// Path in the emulated host and file of each program.
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        let file = |(_, program): (&str, &str)| (format!("/{program}"), self.0.join(program));
        PROGRAMS.map(file).into()
    }
}
