//! State of a vCPU for a snapshot.
//!
//! The order matters (Linux Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c): pending exceptions are the last
//! to be read and to be set, for reading other registers can change them; the processor's features come first, as
//! they decide which registers exist; the local APIC's base is in the special registers; and its timer register is
//! only taken once the local APIC is in that mode and the time-stamp counter runs.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// `IA32_TIME_STAMP_COUNTER` (Intel SDM vol. 4, table 2-2).
const TIME_STAMP_COUNTER: u32 = 0x10;
/// `IA32_TSC_DEADLINE` (Intel SDM vol. 3, 11.5.4.1).
const TSC_DEADLINE: u32 = 0x6e0;
/// Registers of Hyper-V's interface (Hypervisor Top Level Functional Specification, appendix B), which guests are not
/// offered.
const HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;

/// Why the state of a vCPU could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register that the guest has set cannot be set here.
    #[error("MSR {0:#x} cannot be set to {1:#x}")]
    Msr(u32, u64),
    /// More registers than a list can hold.
    #[error("{0} MSRs are too many")]
    TooManyMsrs(usize),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

/// State of one vCPU. Its CPUID follows from its number and the host's processor.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// All zero.
    #[cfg(test)]
    pub fn blank() -> Self {
        Self {
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debugregs: Default::default(),
            lapic: Default::default(),
            msrs: Vec::new(),
            events: Default::default(),
        }
    }

    /// Reads the state of a vCPU that has left `KVM_RUN` for good: what it asked of a device has been answered. `msrs`
    /// are the numbers of the model-specific registers that the host can save.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        // First, because it lets KVM take in what is pending for the local APIC.
        let mp_state = vcpu.get_mp_state().map_err(kvm("read the activity of a vCPU"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(kvm("read general registers"))?,
            sregs: vcpu.get_sregs().map_err(kvm("read special registers"))?,
            // The host's process has not asked for more than what fits in here (arch_prctl(2),
            // ARCH_REQ_XCOMP_GUEST_PERM).
            xsave: vcpu.get_xsave().map_err(kvm("read extended registers"))?,
            xcrs: vcpu.get_xcrs().map_err(kvm("read extended control registers"))?,
            debugregs: vcpu.get_debug_regs().map_err(kvm("read debug registers"))?,
            lapic: vcpu.get_lapic().map_err(kvm("read a local APIC"))?,
            msrs: get_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(kvm("read pending events"))?,
        })
    }

    /// Sets the state of a vCPU that has its CPUID and has not run.
    ///
    /// # Errors
    /// [`StateError`]; the vCPU must not run then.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(kvm("set the activity of a vCPU"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("set general registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(kvm("set special registers"))?;
        // SAFETY: nothing larger was asked for, as at `save`, so KVM reads no more than the structure.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("set extended registers"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(kvm("set extended control registers"))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(kvm("set debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("set a local APIC"))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(kvm("set pending events"))?;
        // The guest's watchdogs shall not take the time between for a hang. KVM refuses with EINVAL as long as the
        // guest has no clock of KVM's, and nothing is lost then.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

/// Reads those of the registers that can be read.
fn get_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let entries: Vec<kvm_msr_entry> = numbers
        .iter()
        .filter(|number| !HYPER_V.contains(number))
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut known = Vec::with_capacity(entries.len());
    let mut rest = &entries[..];
    // KVM stops at the first that this vCPU does not have.
    while !rest.is_empty() {
        let mut list = Msrs::from_entries(rest).map_err(|_| StateError::TooManyMsrs(rest.len()))?;
        let read = vcpu
            .get_msrs(&mut list)
            .map_err(kvm("read MSRs"))?
            .min(rest.len());
        known.extend_from_slice(&list.as_slice()[..read]);
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    order(&mut known);
    Ok(known)
}

/// The counter first and the deadline last, which is compared with it. No deadline can also mean that one has passed
/// whose interrupt was not delivered yet: it is set to now, and an interrupt too many does no harm.
fn order(msrs: &mut [kvm_msr_entry]) {
    let counter = msrs.iter().find(|msr| msr.index == TIME_STAMP_COUNTER);
    let now = counter.map_or(0, |msr| msr.data);
    for msr in msrs.iter_mut() {
        if msr.index == TSC_DEADLINE && msr.data == 0 {
            msr.data = now;
        }
    }
    msrs.sort_by_key(|msr| match msr.index {
        TIME_STAMP_COUNTER => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
}

/// Sets the registers in order. One that cannot be set and is zero is not there.
fn set_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let list = Msrs::from_entries(rest).map_err(|_| StateError::TooManyMsrs(rest.len()))?;
        let set = vcpu.set_msrs(&list).map_err(kvm("set MSRs"))?;
        match rest.get(set) {
            Some(msr) if msr.data != 0 => return Err(StateError::Msr(msr.index, msr.data)),
            Some(_) => rest = &rest[set + 1..],
            None => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn the_deadline_comes_last_and_is_never_zero() {
        let mut msrs = [msr(TSC_DEADLINE, 0), msr(0x174, 5), msr(TIME_STAMP_COUNTER, 99)];
        order(&mut msrs);
        assert_eq!(
            msrs,
            [msr(TIME_STAMP_COUNTER, 99), msr(0x174, 5), msr(TSC_DEADLINE, 99)]
        );
        let mut msrs = [msr(TSC_DEADLINE, 120), msr(TIME_STAMP_COUNTER, 99)];
        order(&mut msrs);
        assert_eq!(msrs[1], msr(TSC_DEADLINE, 120));
    }
}
