//! The guest kernel: Debian's kernel source with `guest-kernel/config`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::cache::{self, Key};
use crate::packages;
use crate::process;
use crate::progress::Progress;
use crate::workspace;

const PACKAGE: &str = "linux-source-6.12";

/// Part of the cache's key: to be raised when the steps below change what they make.
const RECIPE: &str = "1";

/// The same bytes from the same source: no time, user, host or counter of builds in the image.
const REPRODUCIBLE: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "bulkhead"),
    ("KBUILD_BUILD_HOST", "bulkhead"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// The path of the kernel: the one named by `BULKHEAD_KERNEL`, or built unless it is cached.
///
/// # Errors
/// A package is missing and cannot be installed, the build fails, or an option of the fragment did not take its value.
pub fn build(progress: &Progress) -> Result<PathBuf> {
    progress.step("guest kernel", |step| {
        if let Some(own) = std::env::var_os("BULKHEAD_KERNEL") {
            let own = PathBuf::from(own);
            ensure!(own.is_file(), "BULKHEAD_KERNEL={} is not a file", own.display());
            step.cached();
            return own.canonicalize().context("cannot resolve BULKHEAD_KERNEL");
        }
        packages::ensure(packages::KERNEL)?;
        let version = packages::version(PACKAGE).with_context(|| format!("{PACKAGE} has no version"))?;
        let fragment = workspace::path("guest-kernel/config");
        let key = Key::new().with(RECIPE).with(version).with_file(&fragment)?.text();
        let entry = cache::entry(
            "kernel",
            &key,
            || step.cached(),
            |directory| compile(directory, &fragment),
        )?;
        Ok(entry.join("vmlinux"))
    })
}

/// Leaves `vmlinux`, `config` and `build.log` in `directory`.
fn compile(directory: &Path, fragment: &Path) -> Result<()> {
    let log = directory.join("build.log");
    let source = directory.join("source");
    fs::create_dir(&source).context("cannot create the source directory")?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--strip-components=1", "-xJf"])
        .arg(format!("/usr/src/{PACKAGE}.tar.xz"))
        .arg("-C")
        .arg(&source);
    process::run(&mut unpack, &log).context("cannot unpack the kernel's source")?;

    process::run(
        make(&source)
            .env("KCONFIG_ALLCONFIG", fragment)
            .arg("allnoconfig"),
        &log,
    )
    .context("cannot configure the kernel")?;
    let wanted = fs::read_to_string(fragment).context("cannot read the fragment")?;
    let config = fs::read_to_string(source.join(".config")).context("cannot read the configuration")?;
    let differences = differences(&wanted, &config);
    ensure!(
        differences.is_empty(),
        "{} asks for options that the kernel's configuration did not take:\n{differences}",
        fragment.display()
    );

    let jobs = thread::available_parallelism().map_or(1, usize::from);
    process::run(make(&source).arg(format!("-j{jobs}")).arg("vmlinux"), &log)
        .context("cannot build the kernel")?;
    let mut strip = Command::new("strip");
    strip
        .arg("-o")
        .arg(directory.join("vmlinux"))
        .arg(source.join("vmlinux"));
    process::run(&mut strip, &directory.join("strip.log")).context("cannot strip the kernel")?;
    fs::write(directory.join("config"), config).context("cannot keep the configuration")?;
    // One and a half gigabytes that nobody needs any more.
    fs::remove_dir_all(&source).context("cannot remove the source directory")
}

fn make(source: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-s")
        .arg("ARCH=x86_64")
        .arg("-C")
        .arg(source)
        .envs(REPRODUCIBLE);
    // Flags of a make that runs this program are not meant for the kernel's.
    make.env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .env_remove("MFLAGS");
    make
}

/// A line for each option that has another value in `config` than in `wanted`.
fn differences(wanted: &str, config: &str) -> String {
    let mut differences = String::new();
    let options = |text: &'_ str| -> Vec<(String, String)> {
        text.lines()
            .filter(|line| line.starts_with("CONFIG_"))
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim_end().to_owned()))
            .collect()
    };
    let config = options(config);
    for (name, value) in options(wanted) {
        let actual = config
            .iter()
            .find(|(other, _)| *other == name)
            .map_or("n", |(_, actual)| actual.as_str());
        if actual != value {
            let _ = writeln!(differences, "  {name}: {value} wanted, {actual} in .config");
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const CONFIG: &str = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"x\"\nCONFIG_AB=64\n";

    #[test]
    fn a_fragment_that_was_taken_has_no_differences() {
        let wanted = "# reason\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_ABSENT=n\nCONFIG_S=\"x\"\n\nCONFIG_AB=64\n";
        assert_eq!(differences(wanted, CONFIG), "");
    }

    #[test]
    fn what_was_not_taken_is_named() {
        let found = differences(
            "CONFIG_A=n\nCONFIG_B=y\nCONFIG_ABSENT=y\nCONFIG_S=\"y\"\nCONFIG_AB=64\n",
            CONFIG,
        );
        assert_eq!(
            found.lines().map(str::trim).collect::<Vec<_>>(),
            [
                "CONFIG_A: n wanted, y in .config",
                "CONFIG_B: y wanted, n in .config",
                "CONFIG_ABSENT: y wanted, n in .config",
                "CONFIG_S: \"y\" wanted, \"x\" in .config",
            ]
        );
    }

    #[test]
    fn the_fragment_of_the_repository_names_no_option_twice() {
        let fragment = fs::read_to_string(workspace::path("guest-kernel/config")).unwrap();
        let mut names: Vec<&str> = fragment
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(|line| line.split_once('=').unwrap().0)
            .collect();
        names.sort_unstable();
        for pair in names.windows(2) {
            assert_ne!(pair[0], pair[1]);
        }
    }
}
