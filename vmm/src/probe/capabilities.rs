//! What KVM says of itself.

use std::fs::File;

use kvm_ioctls::Cap;

use super::machine::into_kvm;

/// The only KVM API version there is (Linux `Documentation/virt/kvm/api.rst`, 4.1).
pub const API_VERSION: i32 = 12;

/// An extension the VMM needs.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Name without `KVM_CAP_`.
    pub name: &'static str,
    /// What it is needed for.
    pub reason: &'static str,
    /// Whether KVM has it.
    pub present: bool,
}

/// Answers of a KVM device.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// `KVM_GET_API_VERSION`; -1 if the file is no KVM device.
    pub api_version: i32,
    /// Recommended number of vCPUs of one VM.
    pub recommended_vcpus: usize,
    /// Every extension the VMM needs.
    pub list: Vec<Capability>,
}

const NEEDED: [(Cap, &str, &str); 16] = [
    (
        Cap::UserMemory,
        "USER_MEMORY",
        "guest memory is a mapping of the VMM",
    ),
    (
        Cap::ReadonlyMem,
        "READONLY_MEM",
        "the root image is mapped read-only",
    ),
    (Cap::SetTssAddr, "SET_TSS_ADDR", "real mode on Intel processors"),
    (Cap::Irqchip, "IRQCHIP", "interrupt controllers in the kernel"),
    (Cap::Irqfd, "IRQFD", "devices raise interrupts by eventfd"),
    (Cap::Ioeventfd, "IOEVENTFD", "queue kicks do not stop the vCPU"),
    (Cap::ExtCpuid, "EXT_CPUID", "the VMM chooses the guest's CPUID"),
    (Cap::MpState, "MP_STATE", "start and snapshot of several vCPUs"),
    (
        Cap::ImmediateExit,
        "IMMEDIATE_EXIT",
        "a vCPU can be stopped without a race",
    ),
    (
        Cap::TscDeadlineTimer,
        "TSC_DEADLINE_TIMER",
        "the guest's clock event device",
    ),
    (
        Cap::AdjustClock,
        "ADJUST_CLOCK",
        "the guest's clock is read and set on pause and resume",
    ),
    (Cap::VcpuEvents, "VCPU_EVENTS", "pending exceptions in a snapshot"),
    (Cap::Debugregs, "DEBUGREGS", "debug registers in a snapshot"),
    (Cap::Xsave, "XSAVE", "extended processor state in a snapshot"),
    (Cap::Xcrs, "XCRS", "XCR0 in a snapshot"),
    (
        Cap::X86MsrFilter,
        "X86_MSR_FILTER",
        "model-specific registers can be kept from the guest",
    ),
];

/// Asks an open `/dev/kvm`.
#[must_use]
pub fn capabilities(kvm: File) -> Capabilities {
    let kvm = into_kvm(kvm);
    let api_version = kvm.get_api_version();
    // On anything but a KVM device the other calls would mean something else.
    if api_version != API_VERSION {
        return Capabilities {
            api_version,
            recommended_vcpus: 0,
            list: Vec::new(),
        };
    }
    let list = NEEDED
        .into_iter()
        .map(|(cap, name, reason)| Capability {
            name,
            reason,
            present: kvm.check_extension(cap),
        })
        .collect();
    Capabilities {
        api_version,
        recommended_vcpus: kvm.get_nr_vcpus(),
        list,
    }
}
