//! vsock addresses inside a pod's VM.

/// Lowest context id a guest can have (virtio 1.2, 5.10.4). The device is private to its VMM process, so guests may
/// have the same.
pub const FIRST_GUEST_CID: u32 = 3;

/// Context id of the host (virtio 1.2, 5.10.4).
pub const HOST_CID: u32 = 2;

/// Host port the agent dials as soon as it can serve; the connection carries its ttrpc service.
pub const AGENT: u32 = 1024;

/// First host port handed out for a process's standard streams. Ports are never reused in the life
/// of a VM.
pub const FIRST_STREAM: u32 = 1 << 16;
