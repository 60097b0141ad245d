//! The installed programs and images.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bulkhead_sandbox::config::Configuration;

use super::report::{Report, Verdict};

#[cfg(test)]
mod tests;

const GROUP: &str = "Installation";

/// Name by which containerd finds the shim of the runtime type `io.containerd.kata.v2`.
const SHIM: &str = "containerd-shim-kata-v2";

/// `e_machine` of x86-64 (System V ABI).
const EM_X86_64: u16 = 62;

/// Magic number of the EROFS superblock, at byte 1024 (Linux `fs/erofs/erofs_fs.h`).
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const EROFS_SUPERBLOCK: u64 = 1024;

/// Adds what a configured installation consists of.
pub fn check(report: &mut Report, configuration: &Configuration) {
    add(
        report,
        "guest kernel",
        &configuration.kernel,
        is_x86_elf,
        "an uncompressed 64-bit ELF vmlinux",
    );
    add(
        report,
        "root image",
        &configuration.image,
        is_erofs,
        "an EROFS image",
    );
    add(
        report,
        "VMM",
        &configuration.vmm_path(),
        is_program,
        "an executable program",
    );
    match find_in_path(SHIM) {
        Some(path) => add(report, "shim", &path, is_program, "an executable program"),
        None => report.add(
            GROUP,
            "shim",
            Verdict::No,
            format!("{SHIM} is not in PATH, where containerd looks for it"),
            "install it into /usr/local/bin (docs/containerd.md)",
        ),
    }
}

fn add(
    report: &mut Report,
    name: &'static str,
    path: &Path,
    judge: impl Fn(&Path) -> io::Result<bool>,
    expected: &str,
) {
    let shown = path.display();
    let (verdict, reason) = match judge(path) {
        Ok(true) => (Verdict::Yes, shown.to_string()),
        Ok(false) => (Verdict::No, format!("{shown} is not {expected}")),
        Err(error) => (Verdict::No, format!("{shown} cannot be read: {error}")),
    };
    let remedy = if verdict == Verdict::Yes {
        ""
    } else {
        "build and install it (docs/containerd.md), or name another file in the configuration (docs/configuration.md)"
    };
    report.add(GROUP, name, verdict, reason, remedy);
}

/// Whether the file starts like a little-endian 64-bit ELF file for x86-64.
fn is_x86_elf(path: &Path) -> io::Result<bool> {
    let Some(head) = read::<20>(path, 0)? else {
        return Ok(false);
    };
    let machine = u16::from_le_bytes([head[18], head[19]]);
    Ok(head.starts_with(b"\x7fELF\x02\x01") && machine == EM_X86_64)
}

fn is_erofs(path: &Path) -> io::Result<bool> {
    Ok(read::<4>(path, EROFS_SUPERBLOCK)?.map(u32::from_le_bytes) == Some(EROFS_MAGIC))
}

fn is_program(path: &Path) -> io::Result<bool> {
    let executable = path.metadata()?.permissions().mode() & 0o111 != 0;
    Ok(executable && is_x86_elf(path)?)
}

/// Bytes of a file at an offset; `None` if it is shorter.
fn read<const LENGTH: usize>(path: &Path, offset: u64) -> io::Result<Option<[u8; LENGTH]>> {
    let mut bytes = [0; LENGTH];
    match File::open(path)?.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.exists())
}
