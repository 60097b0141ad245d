//! The last steps in a container process before its program runs.

use std::ffi::{CString, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use libcontainer::{capabilities, seccomp};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};

use crate::job::{Report, send_to};

/// Where programs are looked for if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes the program and says why it cannot.
///
/// libcontainer's own executor wants `PATH` to be set and the program to be executable by all, and its reasons are
/// lost once the container has been created.
#[derive(Clone, Debug)]
pub struct ProgramExecutor {
    /// Write end of the status pipe.
    pub status: RawFd,
    /// Read end of a pipe whose end of file lets the program run.
    pub gate: Option<RawFd>,
    /// What is left to confine in an additional process.
    pub confinement: Option<Confinement>,
}

/// Confinement of an additional process, which libcontainer does not give the container's seccomp filter.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// The container's filter.
    pub seccomp: LinuxSeccomp,
    /// The capabilities the process is to have. Loading a filter needs more of them unless `no_new_privs` is set,
    /// so the process comes here with more and drops them after.
    pub capabilities: Option<LinuxCapabilities>,
}

impl Executor for ProgramExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        find(spec).map(drop).map_err(|reason| {
            send_to(self.status, &Report::Refused(reason.clone()));
            ExecutorValidationError::ArgValidationError(reason)
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(gate) = self.gate {
            wait_for_end(gate);
        }
        let reason = match find(spec) {
            Ok(program) => self.confine().unwrap_or_else(|| execute(&program, spec)),
            Err(reason) => reason,
        };
        send_to(self.status, &Report::Refused(reason.clone()));
        Err(ExecutorError::Other(reason))
    }
}

impl ProgramExecutor {
    /// Why confinement failed, if it did.
    fn confine(&self) -> Option<String> {
        let confinement = self.confinement.as_ref()?;
        if let Err(error) = seccomp::initialize_seccomp(&confinement.seccomp) {
            return Some(format!(
                "cannot load the seccomp filter: {}",
                crate::error::chain(&error)
            ));
        }
        let capabilities = confinement.capabilities.as_ref()?;
        let dropped = capabilities::drop_privileges(capabilities, create_syscall().as_ref());
        dropped
            .err()
            .map(|error| format!("cannot drop capabilities: {}", crate::error::chain(&error)))
    }
}

/// Returns at the end of a pipe nobody writes to.
fn wait_for_end(pipe: RawFd) {
    while nix::unistd::read(pipe, &mut [0]) == Err(Errno::EINTR) {}
}

/// The program's file, or the reason in the words users know from other runtimes.
fn find(spec: &Spec) -> Result<PathBuf, String> {
    let process = spec.process().as_ref();
    let name = process
        .and_then(|p| p.args().as_ref()?.first())
        .ok_or("no program to execute")?;
    let env = process.and_then(|p| p.env().as_deref()).unwrap_or_default();
    lookup(name, search_path(env))
}

fn search_path(env: &[String]) -> &str {
    env.iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH)
}

fn lookup(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        let file = PathBuf::from(name);
        return match executable(&file) {
            Ok(()) => Ok(file),
            Err(Errno::ENOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(errno) => Err(format!("exec: {name:?}: {}", describe(errno))),
        };
    }
    let mut denied = None;
    for directory in path.split(':') {
        // An empty element is the working directory (POSIX).
        let file = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&file) {
            Ok(()) => return Ok(file),
            Err(Errno::ENOENT | Errno::ENOTDIR) => (),
            Err(errno) => denied = denied.or(Some(errno)),
        }
    }
    match denied {
        Some(errno) => Err(format!("exec: {name:?}: {}", describe(errno))),
        None => Err(format!("exec: {name:?}: executable file not found in $PATH")),
    }
}

/// Whether this process may execute the file.
fn executable(file: &Path) -> Result<(), Errno> {
    let kind = nix::sys::stat::stat(file)?;
    if kind.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    eaccess(file, AccessFlags::X_OK)
}

fn describe(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

/// Replaces this process; returns only with the reason why not.
fn execute(program: &Path, spec: &Spec) -> String {
    let process = spec.process().as_ref();
    let args = process.and_then(|p| p.args().as_deref()).unwrap_or_default();
    let mut env: Vec<OsString> = process
        .and_then(|p| p.env().as_deref())
        .unwrap_or_default()
        .iter()
        .map(Into::into)
        .collect();
    // libcontainer has looked the user's home directory up and set it.
    if !env.iter().any(|entry| entry.as_bytes().starts_with(b"HOME="))
        && let Some(home) = std::env::var_os("HOME")
    {
        let mut entry = OsString::from("HOME=");
        entry.push(home);
        env.push(entry);
    }
    let c_strings = |texts: Vec<OsString>| -> Result<Vec<CString>, _> {
        texts
            .into_iter()
            .map(|text| CString::new(text.into_vec()))
            .collect()
    };
    let strings = c_strings(vec![program.into()]).and_then(|program| {
        Ok((
            program,
            c_strings(args.iter().map(Into::into).collect())?,
            c_strings(env)?,
        ))
    });
    let Ok((file, args, env)) = strings else {
        return format!("exec: {program:?}: argument with a NUL byte");
    };
    let error = match file.first().map(|file| nix::unistd::execve(file, &args, &env)) {
        Some(Err(errno)) => errno,
        _ => Errno::EINVAL,
    };
    format!("exec: {program:?}: {}", describe(error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert_eq!(lookup("sh", "/nosuch:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(lookup("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        assert_eq!(
            search_path(&["A=1".into(), "PATH=/x".into(), "PATH=/y".into()]),
            "/y"
        );
        assert_eq!(search_path(&[]), DEFAULT_PATH);
    }

    #[test]
    fn reasons_name_the_program() {
        assert_eq!(
            lookup("nosuch", "/bin").unwrap_err(),
            "exec: \"nosuch\": executable file not found in $PATH"
        );
        assert_eq!(
            lookup("/bin/nosuch", "/bin").unwrap_err(),
            "exec: \"/bin/nosuch\": stat /bin/nosuch: no such file or directory"
        );
        assert_eq!(lookup("/bin", "").unwrap_err(), "exec: \"/bin\": is a directory");
        let directory = std::env::temp_dir().join(format!("bulkhead-exec-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("plain");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(
            lookup("plain", directory.to_str().unwrap()).unwrap_err(),
            "exec: \"plain\": permission denied"
        );
        // Executable by its owner only, which is enough.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(lookup("plain", directory.to_str().unwrap()).unwrap(), file);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
