//! Mount options as containerd writes them: flags of the system call, and what the file system is told.

use nix::mount::MsFlags;

use super::MountError;

/// Options split into what mount(2) wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedOptions {
    /// `MS_*` flags without propagation.
    pub flags: MsFlags,
    /// Propagation to set after the mount; empty: none.
    pub propagation: MsFlags,
    /// Options of the file system, in order.
    pub data: Vec<String>,
    /// A loop device is asked for: the source is a regular file.
    pub is_loop: bool,
    /// Read-only with everything mounted below.
    pub recursive_read_only: bool,
}

impl ParsedOptions {
    /// Whether the mount may not be written through.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY) || self.recursive_read_only
    }

    /// The file system's options as mount(2) wants them.
    #[must_use]
    pub fn data_string(&self) -> String {
        self.data.join(",")
    }
}

/// What one option means: flags to set, or flags to clear.
enum Meaning {
    Set(MsFlags),
    Clear(MsFlags),
    Propagation(MsFlags),
    Nothing,
}

fn meaning(option: &str) -> Option<Meaning> {
    use Meaning::{Clear, Nothing, Propagation, Set};
    Some(match option {
        "defaults" | "" => Nothing,
        "ro" => Set(MsFlags::MS_RDONLY),
        "rw" => Clear(MsFlags::MS_RDONLY),
        "nosuid" => Set(MsFlags::MS_NOSUID),
        "suid" => Clear(MsFlags::MS_NOSUID),
        "nodev" => Set(MsFlags::MS_NODEV),
        "dev" => Clear(MsFlags::MS_NODEV),
        "noexec" => Set(MsFlags::MS_NOEXEC),
        "exec" => Clear(MsFlags::MS_NOEXEC),
        "sync" => Set(MsFlags::MS_SYNCHRONOUS),
        "async" => Clear(MsFlags::MS_SYNCHRONOUS),
        "dirsync" => Set(MsFlags::MS_DIRSYNC),
        "mand" => Set(MsFlags::MS_MANDLOCK),
        "nomand" => Clear(MsFlags::MS_MANDLOCK),
        "noatime" => Set(MsFlags::MS_NOATIME),
        "atime" => Clear(MsFlags::MS_NOATIME),
        "nodiratime" => Set(MsFlags::MS_NODIRATIME),
        "diratime" => Clear(MsFlags::MS_NODIRATIME),
        "relatime" => Set(MsFlags::MS_RELATIME),
        "norelatime" => Clear(MsFlags::MS_RELATIME),
        "strictatime" => Set(MsFlags::MS_STRICTATIME),
        "nostrictatime" => Clear(MsFlags::MS_STRICTATIME),
        "bind" => Set(MsFlags::MS_BIND),
        "rbind" => Set(MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        "private" => Propagation(MsFlags::MS_PRIVATE),
        "rprivate" => Propagation(MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
        "slave" => Propagation(MsFlags::MS_SLAVE),
        "rslave" => Propagation(MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
        "shared" => Propagation(MsFlags::MS_SHARED),
        "rshared" => Propagation(MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
        "unbindable" => Propagation(MsFlags::MS_UNBINDABLE),
        "runbindable" => Propagation(MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
        _ => return None,
    })
}

/// Splits `options` into flags and file system data; later options win over earlier ones.
///
/// Options for the caller itself (`X-…`, `x-…`) are dropped, as mount(8) does.
///
/// # Errors
/// [`MountError::Option`] for options this runtime cannot honour.
pub fn parse_options<S: AsRef<str>>(options: &[S]) -> Result<ParsedOptions, MountError> {
    let mut parsed = ParsedOptions {
        flags: MsFlags::empty(),
        propagation: MsFlags::empty(),
        data: Vec::new(),
        is_loop: false,
        recursive_read_only: false,
    };
    for option in options {
        let option = option.as_ref();
        match meaning(option) {
            Some(Meaning::Set(flags)) => parsed.flags |= flags,
            Some(Meaning::Clear(flags)) => parsed.flags -= flags,
            Some(Meaning::Propagation(flags)) => parsed.propagation = flags,
            Some(Meaning::Nothing) => {}
            None => match option {
                "loop" => parsed.is_loop = true,
                "rro" => parsed.recursive_read_only = true,
                _ if option.starts_with("X-") || option.starts_with("x-") => {}
                // An id-mapped mount changes who owns what: ignoring it would be wrong in silence.
                "idmap" | "ridmap" => return Err(MountError::Option(option.into())),
                _ if option.starts_with("uidmap=") || option.starts_with("gidmap=") => {
                    return Err(MountError::Option(option.into()));
                }
                _ => parsed.data.push(option.to_owned()),
            },
        }
    }
    Ok(parsed)
}
