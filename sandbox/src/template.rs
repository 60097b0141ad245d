//! Templates: VMs written down when the guest's agent was ready and nothing of a pod was in them. The VMs of later pods
//! begin there, and share the memory that none of them changes.
//!
//! A store is a directory that only its owner may enter. Each template is a directory in it, named after its [`Shape`],
//! with the files `state` and `memory` of a snapshot and the shape itself as `shape.json`. It appears in one step, by
//! a rename, and is never changed, but for the lists `written-first` and `written` that the first who begins there adds. One template is made at a time: its maker holds a lock on the store. Who makes one
//! removes those that can never be used again.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bulkhead_protocol::{agent, control};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use self::pages::PagesError;
use crate::private::{self, FileError, failed};

mod pages;
#[cfg(test)]
mod tests;

const STATE: &str = "state";
const MEMORY: &str = "memory";
const SHAPE: &str = "shape.json";
const WRITTEN: &str = "written";
const WRITTEN_FIRST: &str = "written-first";

/// End of the name of a template that is being made.
const UNFINISHED: &str = ".new";

/// Most templates: pods choose parts of their shape, by annotations, and each takes some 40 MiB.
const MOST: usize = 8;

/// Why a template cannot be used or made. Pods boot all the same.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// Something of the store.
    #[error(transparent)]
    File(#[from] FileError),
    /// Whoever can write there would write the memory of guests.
    #[error("Directory {} of templates can be changed by others than its owner, or is not this user's", .0.display())]
    Open(PathBuf),
    /// Another one makes a template.
    #[error("Cannot lock {}", .0.display())]
    Lock(PathBuf, #[source] Errno),
    /// Pages.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The shape cannot be written.
    #[error("Cannot encode the shape of a template")]
    Encode(#[source] serde_json::Error),
}

/// Which file it is, and which version of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    length: u64,
    /// Seconds and nanoseconds of the last changes of content and of the inode.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of the file at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn of(path: &Path) -> Result<Self, TemplateError> {
        let metadata = fs::metadata(path).map_err(failed("look at", path))?;
        Ok(Self {
            path: path.into(),
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    fn is_current(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

/// What VMs made from one template have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Who shares the template: all pods, or those of one namespace.
    pub scope: Option<String>,
    /// Guest kernel, root image, VMM.
    pub files: [Identity; 3],
    /// Kernel parameters of the configuration.
    pub command_line: String,
    /// vCPUs on line.
    pub vcpus: u8,
    /// Most vCPUs.
    pub max_vcpus: u8,
    /// Memory at the start in MiB.
    pub memory_mib: u32,
    /// Memory in MiB by which it can grow.
    pub hotplug_mib: u32,
    /// Whether there is a serial console.
    pub console: bool,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// Places for disks.
    pub disk_slots: u32,
    /// Places for network interfaces.
    pub net_slots: u32,
    /// Start of the host: processor, microcode and KVM may be others after the next.
    pub host_boot: String,
    /// Versions of the messages to VMM and agent.
    pub versions: (u32, u32),
}

/// This start of the host.
///
/// # Errors
/// There is no procfs.
pub fn host_boot() -> Result<String, TemplateError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    Ok(text.trim().to_owned())
}

/// Versions of the messages that this program speaks.
pub const VERSIONS: (u32, u32) = (control::VERSION, agent::VERSION);

impl Shape {
    fn name(&self) -> String {
        // The name need not be the same for every version of this program; the shape itself is compared.
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Whether a VM of this shape can still be made.
    fn is_current(&self, host_boot: &str) -> bool {
        self.host_boot == host_boot
            && self.versions == VERSIONS
            && self.files.iter().all(Identity::is_current)
    }
}

/// The files of a template, to be read.
#[derive(Debug)]
pub struct Template {
    /// All but memory.
    pub state: File,
    /// Memory.
    pub memory: File,
    /// Memory that guests which begin here have been seen to write soon; none: nobody has looked yet.
    pub written: Option<Written<File>>,
}

/// Lists of memory, as VMMs make and read them.
#[derive(Debug)]
pub struct Written<T> {
    /// What is written up to the guest's first answer.
    pub first: T,
    /// What is written up to the first container; what is in the other list as well.
    pub later: T,
}

/// Templates of one shape.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    shape: Shape,
}

impl Store {
    /// Of the templates of `shape` in `directory`, which need not be there.
    #[must_use]
    pub fn new(directory: &Path, shape: Shape) -> Self {
        Self {
            directory: directory.into(),
            shape,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.join(self.shape.name())
    }

    /// The template, if it is there.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn find(&self) -> Result<Option<Template>, TemplateError> {
        let path = self.path();
        if shape_in(&path).as_ref() != Some(&self.shape) {
            return Ok(None);
        }
        check_owner(&self.directory)?;
        let open = |name| private::open(&path.join(name));
        let (state, memory) = (open(STATE)?, open(MEMORY)?);
        // Without it the start takes longer.
        let written = open(WRITTEN).and_then(|later| {
            Ok(Written {
                first: open(WRITTEN_FIRST)?,
                later,
            })
        });
        // The one that was not used for the longest time goes first. On a file system without that nothing is lost.
        let _ = File::open(&path).and_then(|directory| directory.set_modified(SystemTime::now()));
        Ok(Some(Template {
            state,
            memory,
            written: written.ok(),
        }))
    }

    /// Begins to make the template; `None` if it is there, or another process makes one.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn begin(&self) -> Result<Option<Making>, TemplateError> {
        let directory = &self.directory;
        private::make_directory(directory)?;
        check_owner(directory)?;
        let lock = private::open(directory)?;
        let lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(TemplateError::Lock(directory.clone(), errno)),
        };
        if shape_in(&self.path()).as_ref() == Some(&self.shape) {
            return Ok(None);
        }
        sweep(directory, &self.shape.host_boot)?;
        let path = directory.join(format!("{}{UNFINISHED}", self.shape.name()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed("create", &path))?;
        let mut making = Making {
            shape: self.shape.clone(),
            path,
            target: self.path(),
            files: None,
            _lock: lock,
        };
        let create = |name| private::create(&making.path.join(name));
        making.files = Some(Template {
            state: create(STATE)?,
            memory: create(MEMORY)?,
            written: None,
        });
        Ok(Some(making))
    }

    /// Keeps lists of memory that guests write soon, for those to come. Those that are there already are replaced.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn keep_written(&self, lists: &Written<Vec<u8>>) -> Result<(), TemplateError> {
        // Who finds the second finds the first.
        self.keep(WRITTEN_FIRST, &lists.first)?;
        self.keep(WRITTEN, &lists.later)
    }

    fn keep(&self, name: &str, bytes: &[u8]) -> Result<(), TemplateError> {
        let path = self.path();
        let unfinished = path.join(format!("{name}.{}", std::process::id()));
        let file = private::create(&unfinished)?;
        let kept = file
            .write_all_at(bytes, 0)
            .and_then(|()| fs::rename(&unfinished, path.join(name)));
        kept.map_err(|error| {
            let _ = fs::remove_file(&unfinished);
            failed("write", &unfinished)(error).into()
        })
    }

    /// Has the page cache keep in large pages what guests of the template only read: the root image, and what of memory
    /// is not in `written`, the longer list. A guest maps such a page with one exit of its vCPU, in place of 512.
    ///
    /// # Errors
    /// The host does not do that, or not now. Nothing else than the time of a start depends on it.
    pub fn enlarge_pages(&self, written: &[u8]) -> Result<(), TemplateError> {
        let memory = private::open(&self.path().join(MEMORY))?;
        pages::enlarge(&memory, &pages::unwritten(&memory, written)?)?;
        let [_, image, _] = &self.shape.files;
        let image = private::open(&image.path)?;
        let length = image.metadata().map_err(PagesError::Length)?.len();
        Ok(pages::enlarge(&image, &pages::whole(length))?)
    }

    /// Removes the template: it cannot be used.
    pub fn discard(&self) {
        remove(&self.path());
    }
}

/// A template that is being made. It is gone when this is dropped before [`finish`](Self::finish).
#[derive(Debug)]
pub struct Making {
    shape: Shape,
    path: PathBuf,
    target: PathBuf,
    files: Option<Template>,
    _lock: Flock<File>,
}

impl Making {
    /// The empty files, to be written.
    pub fn take_files(&mut self) -> Option<Template> {
        self.files.take()
    }

    /// Shows the template to others.
    ///
    /// # Errors
    /// [`TemplateError`]; it is not shown then.
    pub fn finish(self) -> Result<(), TemplateError> {
        let file = self.path.join(SHAPE);
        let json = serde_json::to_vec_pretty(&self.shape).map_err(TemplateError::Encode)?;
        fs::write(&file, json).map_err(failed("write", &file))?;
        // One that cannot be of this shape, or it would have been found.
        remove(&self.target);
        fs::rename(&self.path, &self.target).map_err(failed("rename", &self.path))?;
        Ok(())
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // Not there any more once it is finished.
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove the template {}: {error}", path.display());
        }
        _ => {}
    }
}

fn shape_in(path: &Path) -> Option<Shape> {
    serde_json::from_slice(&fs::read(path.join(SHAPE)).ok()?).ok()
}

/// Removes what was never finished and what can never be used again, and makes room for one more. The caller holds the
/// lock.
fn sweep(directory: &Path, host_boot: &str) -> Result<(), TemplateError> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed("read", directory))? {
        let path = entry.map_err(failed("read", directory))?.path();
        match shape_in(&path) {
            Some(shape) if shape.is_current(host_boot) => {
                let used = fs::metadata(&path).and_then(|metadata| metadata.modified());
                kept.push((used.unwrap_or(SystemTime::UNIX_EPOCH), path));
            }
            _ => {
                log::info!("template {} is out of date", path.display());
                remove(&path);
            }
        }
    }
    kept.sort();
    let excess = (kept.len() + 1).saturating_sub(MOST);
    for (_, path) in &kept[..excess.min(kept.len())] {
        log::info!("template {} makes room for another", path.display());
        remove(path);
    }
    Ok(())
}

fn check_owner(directory: &Path) -> Result<(), TemplateError> {
    if private::is_private(directory)? {
        return Ok(());
    }
    Err(TemplateError::Open(directory.into()))
}
