//! Guest memory types used by every part of the VMM.

/// The guest's memory. Cloning shares the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
