//! The probe's guest program: machine code, the ports it reports by, and its steps.

use std::arch::global_asm;
use std::ptr::addr_of;

use super::machine as map;

/// Ports of the guest's reports; unused by the devices KVM emulates in the kernel.
pub mod port {
    /// A step begins; the value is its number.
    pub const BEGIN: u16 = 0xe0;
    /// The step passed.
    pub const PASS: u16 = 0xe1;
    /// The step's instructions ran but gave a wrong result.
    pub const WRONG: u16 = 0xe2;
    /// CPUID does not offer what the step needs.
    pub const NOT_OFFERED: u16 = 0xe3;
    /// Exception or interrupt nobody asked for; the value is its vector (32: any above 31).
    pub const EXCEPTION: u16 = 0xe4;
    /// All steps are done.
    pub const DONE: u16 = 0xe5;
    /// Asks the host to raise the interrupt line.
    pub const RAISE: u16 = 0xe6;
    /// Reads [`ECHO_VALUE`](super::ECHO_VALUE).
    pub const ECHO: u16 = 0xe7;
    /// Reads the number of ioeventfd notifications since the last read.
    pub const NOTIFIED: u16 = 0xe8;
}

/// What the guest reads from [`port::ECHO`].
pub const ECHO_VALUE: u8 = 0x5a;

const MARK_VALUE: u64 = 0x6b72_616d_6b6c_7562;

/// The steps, in the order the guest takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// GDT, IDT, TSS, segment registers, far return.
    Tables,
    /// Port input and output.
    PortIo,
    /// `cpuid`.
    Cpuid,
    /// Memory access that exits to the host.
    Mmio,
    /// Memory write that signals an eventfd.
    IoEventFd,
    /// `rep stos`, `rep movs`, `repe cmps`.
    Strings,
    /// `rdmsr`, `wrmsr` of EFER and the FS base.
    Msr,
    /// `int3` through the IDT.
    Breakpoint,
    /// `ud2` through the IDT.
    InvalidOpcode,
    /// Page-table change, `invlpg`, CR3, CR4 and CR0 writes.
    Paging,
    /// Page fault with its address, mapped by the handler.
    PageFault,
    /// `fxsave`, `fxrstor`, SSE.
    Fxsave,
    /// `xsetbv`, `xsave`, `xrstor`.
    Xsave,
    /// `lock cmpxchg16b`.
    Cmpxchg16b,
    /// `iretq` to ring 3, `syscall`, `sysret`, `swapgs`, `int 0x80`.
    UserMode,
    /// Local APIC one-shot timer and `hlt`.
    ApicTimer,
    /// TSC-deadline timer.
    TscDeadline,
    /// Interrupt from an irqfd through the I/O APIC.
    IrqFd,
}

impl Step {
    /// All steps in order.
    pub const ALL: [Self; 18] = [
        Self::Tables,
        Self::PortIo,
        Self::Cpuid,
        Self::Mmio,
        Self::IoEventFd,
        Self::Strings,
        Self::Msr,
        Self::Breakpoint,
        Self::InvalidOpcode,
        Self::Paging,
        Self::PageFault,
        Self::Fxsave,
        Self::Xsave,
        Self::Cmpxchg16b,
        Self::UserMode,
        Self::ApicTimer,
        Self::TscDeadline,
        Self::IrqFd,
    ];

    /// The step with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// What the step does, in the words of a processor manual.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::Tables => "descriptor tables (lgdt, lidt, ltr, far return)",
            Self::PortIo => "port I/O (in, out)",
            Self::Cpuid => "cpuid",
            Self::Mmio => "memory-mapped I/O",
            Self::IoEventFd => "ioeventfd notification",
            Self::Strings => "string instructions (rep stos, rep movs, repe cmps)",
            Self::Msr => "model-specific registers (EFER, FS base)",
            Self::Breakpoint => "int3 through the IDT",
            Self::InvalidOpcode => "ud2 through the IDT",
            Self::Paging => "page-table changes (invlpg, CR3, CR4, CR0)",
            Self::PageFault => "page fault",
            Self::Fxsave => "SSE with fxsave and fxrstor",
            Self::Xsave => "xsetbv, xsave and xrstor",
            Self::Cmpxchg16b => "cmpxchg16b",
            Self::UserMode => "user mode (iretq, syscall, sysret, swapgs, int 0x80)",
            Self::ApicTimer => "local APIC timer and hlt",
            Self::TscDeadline => "TSC-deadline timer",
            Self::IrqFd => "irqfd interrupt through the I/O APIC",
        }
    }
}

global_asm!(
    include_str!("guest.s"),
    PORT_BEGIN = const port::BEGIN,
    PORT_PASS = const port::PASS,
    PORT_WRONG = const port::WRONG,
    PORT_NOT_OFFERED = const port::NOT_OFFERED,
    PORT_EXCEPTION = const port::EXCEPTION,
    PORT_DONE = const port::DONE,
    PORT_RAISE = const port::RAISE,
    PORT_ECHO = const port::ECHO,
    PORT_NOTIFIED = const port::NOTIFIED,
    ECHO_VALUE = const ECHO_VALUE,
    MARK_VALUE = const MARK_VALUE,
    DATA = const map::DATA,
    IDT = const map::IDT,
    TSS = const map::TSS,
    FPU_AREA = const map::FPU_AREA,
    XSAVE_AREA = const map::XSAVE_AREA,
    PAGE_A = const map::PAGE_A,
    PAGE_B = const map::PAGE_B,
    WINDOW = const map::WINDOW,
    WINDOW_TABLE = const map::WINDOW_TABLE,
    INTERRUPT_STACK = const map::INTERRUPT_STACK,
    USER_STACK = const map::USER_STACK,
    MMIO_BASE = const map::MMIO,
    MMIO_NOTIFY = const map::MMIO_NOTIFY,
    APIC = const map::APIC,
    IO_APIC = const map::IO_APIC,
    GSI = const map::GSI,
    TABLES = const Step::Tables as u8,
    PORT_IO = const Step::PortIo as u8,
    CPUID = const Step::Cpuid as u8,
    MMIO = const Step::Mmio as u8,
    IOEVENTFD = const Step::IoEventFd as u8,
    STRING = const Step::Strings as u8,
    MSR = const Step::Msr as u8,
    BREAKPOINT = const Step::Breakpoint as u8,
    INVALID_OPCODE = const Step::InvalidOpcode as u8,
    PAGING = const Step::Paging as u8,
    PAGE_FAULT = const Step::PageFault as u8,
    FXSAVE = const Step::Fxsave as u8,
    XSAVE = const Step::Xsave as u8,
    CMPXCHG16B = const Step::Cmpxchg16b as u8,
    USER_MODE = const Step::UserMode as u8,
    APIC_TIMER = const Step::ApicTimer as u8,
    TSC_DEADLINE = const Step::TscDeadline as u8,
    IRQFD = const Step::IrqFd as u8,
);

unsafe extern "C" {
    static bulkhead_probe_guest_start: u8;
    static bulkhead_probe_guest_end: u8;
}

/// The machine code, to be placed at [`map::CODE`].
#[must_use]
pub fn code() -> &'static [u8] {
    let start = addr_of!(bulkhead_probe_guest_start);
    let length = addr_of!(bulkhead_probe_guest_end) as usize - start as usize;
    // SAFETY: guest.s defines both symbols around one piece of a read-only section, the end after the start.
    unsafe { std::slice::from_raw_parts(start, length) }
}
