//! State of a vCPU before its first instruction.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use super::kernel::GDT_ENTRIES;
use super::layout;

/// CR0: protection, extension type, numeric error, paging (Intel SDM vol. 3, 2.5).
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enable and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// `IA32_MTRR_DEF_TYPE`: enabled, default type write-back. Otherwise the kernel sees uncached memory.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// `IA32_MISC_ENABLE`: fast strings.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);

/// Local vector table registers of the local APIC and delivery modes (Intel SDM vol. 3, 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_NMI: u32 = 0b100 << 8;
const MODE_EXT_INT: u32 = 0b111 << 8;

/// Why a register could not be set.
#[derive(Debug, thiserror::Error)]
#[error("Cannot set the {what} of a vCPU")]
pub struct RegisterError {
    what: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

fn error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RegisterError {
    move |source| RegisterError { what, source }
}

/// Routes the legacy interrupt controller to LINT0 and NMI to LINT1, as firmware would; for every vCPU.
///
/// # Errors
/// [`RegisterError`].
pub fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut lapic = vcpu.get_lapic().map_err(error("local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXT_INT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(error("local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut lapic.regs[register..register + 4];
    let mut value = 0u32;
    for (index, byte) in bytes.iter().enumerate() {
        value |= u32::from(*byte as u8) << (8 * index);
    }
    value = value & !(0b111 << 8) | mode;
    for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = new as _;
    }
}

/// Sets model-specific registers to what firmware leaves; for every vCPU, after its CPUID.
///
/// # Errors
/// [`RegisterError`].
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    for (index, data) in [MTRR_DEF_TYPE, MISC_ENABLE] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs =
            Msrs::from_entries(&[entry]).map_err(|_| error("MSRs")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        // A register this processor does not have is not set; none of these is needed to boot.
        vcpu.set_msrs(&msrs).map_err(error("MSRs"))?;
    }
    Ok(())
}

/// Sets the bootstrap vCPU to the kernel's 64-bit entry: long mode on the boot page tables, flat segments,
/// RSI at the zero page.
///
/// # Errors
/// [`RegisterError`].
pub fn set_entry(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegisterError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(error("floating point state"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE.0,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(error("general registers"))?;
    let mut sregs = vcpu.get_sregs().map_err(error("segment registers"))?;
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = segment(2);
    sregs.tr = kvm_segment {
        limit: 0xffff,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT.0, (GDT_ENTRIES.len() * 8 - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (layout::IDT.0, 7);
    sregs.cr3 = layout::PML4.0;
    sregs.cr0 |= CR0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER;
    vcpu.set_sregs(&sregs).map_err(error("segment registers"))
}

/// Unpacks entry `index` of the boot GDT (Intel SDM vol. 3, 3.4.5).
fn segment(index: usize) -> kvm_segment {
    let entry = GDT_ENTRIES[index];
    let bits = |shift: u32, width: u32| (entry >> shift & ((1 << width) - 1)) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: (index * 8) as u16,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_segment_is_long_and_data_segment_flat() {
        let code = segment(2);
        assert_eq!(
            (code.selector, code.type_, code.s, code.present, code.l, code.db),
            (0x10, 0xb, 1, 1, 1, 0)
        );
        let data = segment(3);
        assert_eq!(
            (data.selector, data.type_, data.s, data.present, data.l, data.db),
            (0x18, 3, 1, 1, 0, 1)
        );
    }

    #[test]
    fn delivery_mode_leaves_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0 + 2] = 1; // masked
        set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXT_INT);
        assert_eq!(lapic.regs[LVT_LINT0 + 1], 7);
        assert_eq!(lapic.regs[LVT_LINT0 + 2], 1);
    }
}
