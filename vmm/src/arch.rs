//! What x86-64 prescribes: the guest-physical map, the kernel's entry state, CPUID and the MP table.

pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod registers;
pub mod state;
