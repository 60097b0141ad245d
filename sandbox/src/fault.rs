//! The numbered steps of a sandbox's and a container's life, and the faults a test can have at each.
//!
//! In an ordinary build [`point`] and [`reach`] do nothing: they are here so that every phase has one name, which
//! errors show as well. A build with the feature `fault-injection` looks at [`CONTROL`] at every step. The file holds
//! `STEP MODE`; the first process that comes to that step takes the file away and has the fault:
//!
//! | mode | what happens |
//! |---|---|
//! | `error` | the step fails |
//! | `hang` | the step does not end |
//! | `kill-shim` | this process is killed |
//! | `kill-vmm` | the VMM is killed, and the step goes on |

use std::io;

/// File that tells a build with faults which one to have.
pub const CONTROL: &str = "/run/bulkhead-fault";

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $operation:literal, $words:literal, $when:ident;)*) => {
        /// A step. They are numbered in the order of a container's life, from 1.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($(#[$doc])* $name,)*
        }

        impl Step {
            /// All of them, in their order.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What it is, for an error.
            #[must_use]
            pub fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }

            /// What a client has asked for: `create`, `start`, `exec`, `update` or `delete`.
            #[must_use]
            pub fn operation(self) -> &'static str {
                match self { $(Self::$name => $operation,)* }
            }

            /// When in the sandbox's life it is.
            #[must_use]
            pub fn when(self) -> When {
                match self { $(Self::$name => When::$when,)* }
            }
        }
    };
}

/// Who is there when a step is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Nobody answers calls yet, or any more.
    Alone,
    /// The shim answers calls; there is no VMM.
    Serving,
    /// The shim answers calls, and the VMM is there.
    Running,
}

impl When {
    /// One word for the list of steps.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Serving => "serving",
            Self::Running => "running",
        }
    }
}

steps! {
    /// `start` names the state directory in the bundle.
    StateFile = "create", "note of the state directory", Alone;
    /// The state directory and its journal are made.
    JournalMade = "create", "making of the journal", Alone;
    /// The server's socket is bound.
    SocketBound = "create", "binding of the server's socket", Alone;
    /// The pod's cgroup is made.
    CgroupMade = "create", "making of the cgroup", Alone;
    /// The server process is made.
    ServerForked = "create", "start of the server", Alone;
    /// The server enters the pod's network namespace.
    NetworkEntered = "create", "entry of the network namespace", Alone;
    /// An interface is redirected to a tap.
    InterfaceJoined = "create", "redirection of an interface", Alone;
    /// The interface has an ingress queue, and is not redirected yet.
    InterfaceQueued = "create", "ingress queue of an interface", Alone;
    /// The server writes itself down.
    ServerRecorded = "create", "note of the server", Alone;
    /// The shared tree is mounted.
    TreeMounted = "create", "mount of the shared tree", Alone;
    /// The VMM process is started.
    VmmStarted = "create", "start of the VMM", Serving;
    /// The VMM is written down.
    VmmRecorded = "create", "note of the VMM", Running;
    /// The VMM is told what to run.
    VmmConfigured = "create", "VMM set-up", Running;
    /// The guest's kernel boots, and its agent starts.
    GuestBooted = "create", "guest kernel boot and agent start", Running;
    /// The guest's interfaces are set up.
    GuestNetwork = "create", "network setup", Running;
    /// The agent's events are subscribed to.
    GuestEvents = "create", "event subscription", Running;
    /// The ends of the standard streams are opened.
    StreamsOpened = "create", "opening of the standard streams", Serving;
    /// The root file system and the volumes are mounted.
    RootMounted = "create", "mounts of root file system and volumes", Serving;
    /// The VM grows for the container.
    VmGrown = "create", "growth of the virtual machine", Running;
    /// Disks of the root file system are attached.
    DisksAttached = "create", "attachment of disks", Running;
    /// The guest gets the container's volumes.
    VolumesProvided = "create", "volumes of the guest", Running;
    /// The VMM listens for the standard streams.
    StreamsListening = "create", "connection of the standard streams", Running;
    /// The agent makes the container.
    GuestContainer = "create", "container creation", Running;
    /// The VM gets the size of its containers.
    VmFitted = "create", "size of the virtual machine", Running;
    /// Late interfaces are waited for.
    NetworkSettled = "start", "late interfaces", Running;
    /// The agent starts the container.
    GuestStarted = "start", "container start", Running;
    /// The start is told.
    StartTold = "start", "news of the start", Running;
    /// The streams of a further process are connected.
    ExecStreams = "exec", "connection of the process's streams", Running;
    /// The agent starts a further process.
    GuestExec = "exec", "process start", Running;
    /// The VM grows before limits are raised.
    UpdateGrown = "update", "growth of the virtual machine", Running;
    /// The agent changes the limits.
    GuestUpdated = "update", "update of limits", Running;
    /// The VM gets the size of the new limits.
    UpdateFitted = "update", "size of the virtual machine", Running;
    /// What the process wrote is waited for.
    OutputDrained = "delete", "end of the output", Running;
    /// The agent removes the container.
    GuestRemoved = "delete", "container removal", Running;
    /// The container's disks are detached.
    DisksDetached = "delete", "detachment of disks", Running;
    /// The container's volumes are given back.
    VolumesReleased = "delete", "removal of volumes", Running;
    /// The container's folder of the shared tree is removed.
    RootUnmounted = "delete", "unmounting of the root file system", Running;
    /// The VM is ended.
    VmHalted = "delete", "end of the virtual machine", Running;
    /// The shared tree is unmounted.
    TreeUnmounted = "delete", "unmounting of the shared tree", Alone;
    /// The server leaves the pod's cgroup.
    CgroupLeft = "delete", "leaving of the cgroup", Alone;
    /// The journal is replayed.
    JournalReplayed = "delete", "replay of the journal", Alone;
    /// The state directory is removed.
    StateRemoved = "delete", "removal of the state directory", Alone;
}

impl Step {
    /// Its number, from 1.
    #[must_use]
    pub fn number(self) -> usize {
        self as usize + 1
    }
}

/// Has the fault that is asked for at this step, if it is one of this step.
///
/// # Errors
/// The fault is an error.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn point(_: Step) -> io::Result<()> {
    Ok(())
}

/// As [`point`], for steps during which the process has to answer.
///
/// # Errors
/// The fault is an error.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub async fn reach(_: Step) -> io::Result<()> {
    Ok(())
}

/// The VMM that a fault kills.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn vmm(_: i32) {}

#[cfg(feature = "fault-injection")]
mod injected {
    use std::fs;
    use std::sync::atomic::{AtomicI32, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{Pid, getpid};

    use super::*;

    static VMM: AtomicI32 = AtomicI32::new(0);

    /// The VMM that a fault kills.
    pub fn vmm(pid: i32) {
        VMM.store(pid, Ordering::Relaxed);
    }

    /// Takes what is asked for at this step.
    fn take(step: Step) -> Option<String> {
        let text = fs::read_to_string(CONTROL).ok()?;
        let (name, mode) = text.trim().split_once(' ')?;
        // Whoever removes the file has the fault, and nobody else.
        (name == step.name() && fs::remove_file(CONTROL).is_ok()).then(|| mode.to_owned())
    }

    /// Whether the step hangs.
    fn fault(step: Step) -> io::Result<bool> {
        let Some(mode) = take(step) else { return Ok(false) };
        log::warn!(
            "fault injected at step {} ({}): {mode}",
            step.number(),
            step.name()
        );
        let text = format!("fault injected at step {} ({})", step.number(), step.name());
        match mode.as_str() {
            "hang" => return Ok(true),
            "kill-shim" => {
                let _ = kill(getpid(), Signal::SIGKILL);
            }
            "kill-vmm" => match VMM.load(Ordering::Relaxed) {
                0 => return Err(io::Error::other(format!("{text}: there is no VMM to kill"))),
                pid => {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            },
            _ => return Err(io::Error::other(text)),
        }
        Ok(false)
    }

    /// Has the fault that is asked for at this step, if it is one of this step.
    ///
    /// # Errors
    /// The fault is an error.
    pub fn point(step: Step) -> io::Result<()> {
        if fault(step)? {
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
        Ok(())
    }

    /// As [`point`], for steps during which the process has to answer.
    ///
    /// # Errors
    /// The fault is an error.
    pub async fn reach(step: Step) -> io::Result<()> {
        if fault(step)? {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

#[cfg(feature = "fault-injection")]
pub use injected::{point, reach, vmm};

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn steps_are_numbered_from_one_and_have_names_of_their_own() {
        let numbers: Vec<usize> = Step::ALL.iter().map(|step| step.number()).collect();
        assert_eq!(numbers, (1..=Step::ALL.len()).collect::<Vec<_>>());
        let names: HashSet<&str> = Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
        for step in Step::ALL {
            assert!(["create", "start", "exec", "update", "delete"].contains(&step.operation()));
        }
    }
}
