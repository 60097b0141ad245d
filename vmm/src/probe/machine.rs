//! The probe's virtual machine: 2 MiB of memory, one vCPU that starts in 64-bit mode, KVM's interrupt
//! controllers, one ioeventfd, one irqfd.
//!
//! Guest-physical map, identity-mapped in the page tables for kernel and user:
//!
//! | address | what |
//! |---|---|
//! | 0x1000-0x5fff | page tables (see [`write_page_tables`]) |
//! | 0x6000, 0x7000 | IDT, TSS |
//! | 0x8000, 0x9000 | FXSAVE and XSAVE areas |
//! | 0xa000 | data block of the guest program |
//! | 0xb000, 0xc000 | pages A and B of the paging steps |
//! | 0xd000-0x12fff | three stacks |
//! | 0x20000 | code |
//! | 0x200000 | virtual window of two pages, mapped by the program |
//! | 0xd0000000 | no memory: MMIO |
//! | 0xfec00000, 0xfee00000 | I/O APIC, local APIC |

use std::fs::File;
use std::os::fd::IntoRawFd;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestMemory;

const MEMORY_SIZE: usize = 2 << 20;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const LOW_DIRECTORY: u64 = 0x3000;
/// Page table of the window.
pub const WINDOW_TABLE: u64 = 0x4000;
const HIGH_DIRECTORY: u64 = 0x5000;
/// Interrupt descriptor table, 4 KiB.
pub const IDT: u64 = 0x6000;
/// Task state segment, 104 bytes; the guest's GDT holds its address in 16 bits.
pub const TSS: u64 = 0x7000;
/// 512 bytes for FXSAVE.
pub const FPU_AREA: u64 = 0x8000;
/// One page for XSAVE; x87, SSE and AVX take 832 bytes (Intel SDM 1, 13.4).
pub const XSAVE_AREA: u64 = 0x9000;
/// Data block.
pub const DATA: u64 = 0xa000;
/// First page of the paging steps.
pub const PAGE_A: u64 = 0xb000;
/// Second page of the paging steps.
pub const PAGE_B: u64 = 0xc000;
/// Top of the program's stack.
const STACK: u64 = 0xf000;
/// Top of the stack for interrupts out of ring 3 (RSP0).
pub const INTERRUPT_STACK: u64 = 0x11000;
/// Top of the stack in ring 3.
pub const USER_STACK: u64 = 0x13000;
/// The program.
pub const CODE: u64 = 0x2_0000;
/// Virtual address of the two pages the paging steps map.
pub const WINDOW: u64 = 0x20_0000;
/// Start of a 2 MiB range without memory.
pub const MMIO: u64 = 0xd000_0000;
/// Offset in the MMIO range that signals the ioeventfd.
pub const MMIO_NOTIFY: u64 = 0x100;
/// Local APIC (Intel SDM 3, 11.4.1).
pub const APIC: u64 = 0xfee0_0000;
/// I/O APIC of KVM.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Interrupt line of the irqfd.
pub const GSI: u32 = 5;

/// Three pages below 4 GiB that KVM needs on Intel processors without "unrestricted guest", and a page
/// for its identity map before them.
const KVM_TSS: usize = 0xfffb_d000;
const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// CPUID.1:ECX bit of the TSC-deadline timer. KVM reports it by capability, not in its CPUID list.
const TSC_DEADLINE_BIT: u32 = 1 << 24;

/// Which part of the set-up failed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// `KVM_CREATE_VM`.
    #[error("KVM_CREATE_VM failed")]
    CreateVm(#[source] errno::Error),
    /// TSS and identity map addresses.
    #[error("KVM_SET_TSS_ADDR or KVM_SET_IDENTITY_MAP_ADDR failed")]
    ReservedPages(#[source] errno::Error),
    /// In-kernel interrupt controllers.
    #[error("KVM_CREATE_IRQCHIP failed")]
    IrqChip(#[source] errno::Error),
    /// Allocation of guest memory.
    #[error("Cannot map guest memory")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    /// Filling of guest memory.
    #[error("Cannot write guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
    /// Registration of guest memory.
    #[error("KVM_SET_USER_MEMORY_REGION failed")]
    MemorySlot(#[source] errno::Error),
    /// An eventfd.
    #[error("Cannot create an eventfd")]
    EventFd(#[source] std::io::Error),
    /// `KVM_IOEVENTFD`.
    #[error("KVM_IOEVENTFD failed")]
    IoEventFd(#[source] errno::Error),
    /// `KVM_IRQFD`.
    #[error("KVM_IRQFD failed")]
    IrqFd(#[source] errno::Error),
    /// `KVM_CREATE_VCPU`.
    #[error("KVM_CREATE_VCPU failed")]
    CreateVcpu(#[source] errno::Error),
    /// CPUID of the vCPU.
    #[error("KVM_GET_SUPPORTED_CPUID or KVM_SET_CPUID2 failed")]
    Cpuid(#[source] errno::Error),
    /// Registers of the vCPU.
    #[error("Cannot set the vCPU's registers")]
    Registers(#[source] errno::Error),
}

/// A VM ready to run the guest program.
#[derive(Debug)]
pub struct Machine {
    /// The only vCPU.
    pub vcpu: VcpuFd,
    /// Signalled by a guest write to `MMIO + MMIO_NOTIFY`.
    pub notify: EventFd,
    /// Raises [`GSI`].
    pub line: EventFd,
    _vm: VmFd,
    /// 2 MiB from address 0. Unmapped last.
    pub memory: GuestMemory,
}

impl Machine {
    /// Builds the VM with `program` at [`CODE`].
    ///
    /// # Errors
    /// The first KVM call that fails.
    pub fn new(kvm: File, program: &[u8]) -> Result<Self, SetupError> {
        let kvm = into_kvm(kvm);
        let vm = create_vm(&kvm)?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .and_then(|()| vm.set_tss_address(KVM_TSS))
            .map_err(SetupError::ReservedPages)?;
        vm.create_irq_chip().map_err(SetupError::IrqChip)?;

        let memory: GuestMemory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).map_err(SetupError::Memory)?;
        write_page_tables(&memory).map_err(SetupError::Write)?;
        memory
            .write_slice(program, GuestAddress(CODE))
            .map_err(SetupError::Write)?;
        let host_address = memory
            .get_host_address(GuestAddress(0))
            .map_err(SetupError::Write)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_SIZE as u64,
            userspace_addr: host_address as u64,
        };
        // SAFETY: the region is a live mapping of that size, owned by `memory`, which the returned machine
        // drops after the vCPU and the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(SetupError::MemorySlot)?;

        let notify = EventFd::new(EFD_NONBLOCK).map_err(SetupError::EventFd)?;
        vm.register_ioevent(&notify, &IoEventAddress::Mmio(MMIO + MMIO_NOTIFY), 1u32)
            .map_err(SetupError::IoEventFd)?;
        let line = EventFd::new(EFD_NONBLOCK).map_err(SetupError::EventFd)?;
        vm.register_irqfd(&line, GSI).map_err(SetupError::IrqFd)?;

        let vcpu = vm.create_vcpu(0).map_err(SetupError::CreateVcpu)?;
        set_cpuid(&kvm, &vcpu).map_err(SetupError::Cpuid)?;
        set_registers(&vcpu).map_err(SetupError::Registers)?;
        Ok(Self {
            vcpu,
            notify,
            line,
            _vm: vm,
            memory,
        })
    }
}

/// Wraps an open `/dev/kvm`.
pub(super) fn into_kvm(file: File) -> Kvm {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is open and its ownership passes from `file` to the result.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// `KVM_CREATE_VM` gives EINTR on a busy host; a few attempts are enough.
fn create_vm(kvm: &Kvm) -> Result<VmFd, SetupError> {
    let mut attempts = 0;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempts < 10 => attempts += 1,
            result => return result.map_err(SetupError::CreateVm),
        }
    }
}

/// Four levels: the first 2 MiB as one large page, the window by 4 KiB pages (the first is page A, the
/// second not present), and large pages for MMIO and the two APICs.
fn write_page_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    /// Present, writable, user.
    const TABLE: u64 = 0x7;
    /// The same, 2 MiB page.
    const LARGE: u64 = 0x87;
    /// The same with write-through and cache disable, for devices.
    const DEVICE: u64 = 0x9f;
    let directory_entry = |address: u64| HIGH_DIRECTORY + ((address >> 21) & 0x1ff) * 8;
    let entries = [
        (PML4, PDPT | TABLE),
        (PDPT, LOW_DIRECTORY | TABLE),
        (PDPT + 3 * 8, HIGH_DIRECTORY | TABLE),
        (LOW_DIRECTORY, LARGE),
        (LOW_DIRECTORY + 8, WINDOW_TABLE | TABLE),
        (WINDOW_TABLE, PAGE_A | TABLE),
        (directory_entry(MMIO), MMIO | DEVICE),
        (directory_entry(IO_APIC), IO_APIC | DEVICE),
        (directory_entry(APIC), APIC | DEVICE),
    ];
    entries
        .into_iter()
        .try_for_each(|(address, entry)| memory.write_obj(entry, GuestAddress(address)))
}

fn set_cpuid(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), errno::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid
            .as_mut_slice()
            .iter_mut()
            .filter(|entry| entry.function == 1)
        {
            entry.ecx |= TSC_DEADLINE_BIT;
        }
    }
    vcpu.set_cpuid2(&cpuid)
}

/// 64-bit mode with paging on, at the start of the program, interrupts off. The descriptor caches hold
/// flat segments; the tables themselves are the program's first step.
fn set_registers(vcpu: &VcpuFd) -> Result<(), errno::Error> {
    /// PE, MP, ET, NE, WP, AM, PG.
    const CR0: u64 = 0x8005_0033;
    /// PAE, OSFXSR, OSXMMEXCPT.
    const CR4: u64 = 0x620;
    /// LME, LMA.
    const EFER: u64 = 0x500;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x08,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: 0x30,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    })
}
