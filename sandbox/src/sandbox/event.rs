//! What a sandbox tells its owner.

use crate::process::Exit;

/// What happens in a sandbox. Events of one process come in the order of its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxEvent {
    /// A container exists.
    Created {
        /// Container id.
        container: String,
    },
    /// A process runs. The init process has an empty exec id, here and below.
    Started {
        /// Container id.
        container: String,
        /// Exec id.
        exec: String,
    },
    /// A process was added and waits for its start.
    ExecAdded {
        /// Container id.
        container: String,
        /// Exec id.
        exec: String,
    },
    /// A process has ended.
    Exited {
        /// Container id.
        container: String,
        /// Exec id.
        exec: String,
        /// How.
        exit: Exit,
    },
    /// The guest's kernel killed a process of the container for lack of memory.
    OutOfMemory {
        /// Container id.
        container: String,
    },
    /// The virtual machine has ended under a container that runs. Its exits follow.
    Lost {
        /// Container id.
        container: String,
        /// How the machine ended, with the end of the guest's console.
        reason: String,
    },
    /// A container is frozen.
    Paused {
        /// Container id.
        container: String,
    },
    /// A container runs again.
    Resumed {
        /// Container id.
        container: String,
    },
    /// A container is gone.
    Deleted {
        /// Container id.
        container: String,
        /// How its init process ended.
        exit: Exit,
    },
}

/// Receives a sandbox's events, in order. Called with the sandbox's state locked: it must neither wait
/// nor call the sandbox.
pub trait EventSink: Send + Sync {
    /// Takes one event.
    fn event(&self, event: SandboxEvent);
}
