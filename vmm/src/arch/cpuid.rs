//! CPUID as the guest sees it.
//!
//! KVM's supported values are the base. Changed are: what depends on the vCPU's number, the topology (one
//! package of single-threaded cores sharing the last cache), the performance monitor and nested
//! virtualisation (both absent), and the bits a guest of a hypervisor needs. Extended leaves that AMD
//! defines are reserved on Intel processors and left alone there.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Vendors whose extended leaves are AMD's (leaf 0, registers EBX, EDX, ECX).
const AMD_VENDORS: [&[u8; 12]; 2] = [b"AuthenticAMD", b"HygonGenuine"];

/// Physical address bits of a processor that does not tell (AMD APM vol. 3, E.4.7).
const DEFAULT_ADDRESS_BITS: u32 = 36;

/// Fits `supported` to vCPU `id` of `count`.
pub fn normalize(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let amd = is_amd(supported);
    let (id, count) = (u32::from(id), u32::from(count.max(1)));
    for entry in cpuid.as_mut_slice() {
        normalize_entry(entry, id, count);
        if amd {
            normalize_amd_entry(entry, id, count);
        }
    }
    cpuid
}

fn is_amd(supported: &CpuId) -> bool {
    let mut entries = supported.as_slice().iter();
    entries.find(|entry| entry.function == 0).is_some_and(|entry| {
        let words = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
        AMD_VENDORS.iter().any(|vendor| words.concat() == **vendor)
    })
}

/// Number of bits an APIC id needs when there are `count` of them.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Width of a physical address (leaf 0x8000_0008); 36 bits, which every 64-bit processor has, if it is not told.
pub fn address_bits(supported: &CpuId) -> u32 {
    let mut entries = supported.as_slice().iter();
    match entries.find(|entry| entry.function == 0x8000_0008) {
        Some(entry) if (36..=52).contains(&(entry.eax & 0xff)) => entry.eax & 0xff,
        _ => DEFAULT_ADDRESS_BITS,
    }
}

fn set(register: &mut u32, mask: u32, value: u32) {
    *register = *register & !mask | value & mask;
}

fn normalize_entry(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match (entry.function, entry.index) {
        // Features (Intel SDM vol. 2, CPUID leaf 1).
        (0x1, _) => {
            set(&mut entry.ebx, 0xff << 24, id << 24);
            set(&mut entry.ebx, 0xff << 16, (1 << id_bits(count)) << 16);
            // CLFLUSH line of 64 bytes.
            set(&mut entry.ebx, 0xff << 8, 8 << 8);
            // Hypervisor and TSC-deadline timer on, VMX and PDCM (perfmon MSR) off.
            entry.ecx |= 1 << 31 | 1 << 24;
            entry.ecx &= !(1 << 5 | 1 << 15);
            // HTT means "more than one logical processor per package".
            set(&mut entry.edx, 1 << 28, u32::from(count > 1) << 28);
        }
        // Deterministic cache parameters, Intel leaf 4 and AMD 0x8000001D alike: first and second level
        // private, the rest shared by all.
        (0x4 | 0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { (1 << id_bits(count)) - 1 } else { 0 };
            set(&mut entry.eax, 0xfff << 14, sharing << 14);
            if entry.function == 0x4 {
                set(&mut entry.eax, 0x3f << 26, ((1 << id_bits(count)) - 1) << 26);
            }
        }
        // Energy and performance bias, thermal: none.
        (0x6, _) => {
            entry.eax &= 1 << 2;
            entry.ecx &= !(1 << 3);
        }
        // Architectural performance monitoring: none.
        (0xa, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        // Extended topology: threads, then cores.
        (0xb | 0x1f, 0) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id);
        }
        (0xb | 0x1f, 1) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id_bits(count), count, 2 << 8 | 1, id);
        }
        (0xb | 0x1f, index) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, index, id);
        }
        _ => {}
    }
}

fn normalize_amd_entry(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match (entry.function, entry.index) {
        // Performance monitoring, version 2: none.
        (0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        // AMD features: SVM and the performance counter extensions off.
        (0x8000_0001, _) => {
            entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28);
            if count > 1 {
                // CmpLegacy: the HTT bit speaks of cores.
                entry.ecx |= 1 << 1;
            } else {
                entry.ecx &= !(1 << 1);
            }
        }
        // AMD size identifiers: cores of the package.
        (0x8000_0008, _) => {
            entry.ecx = id_bits(count) << 12 | (count - 1);
        }
        // SVM revision: none.
        (0x8000_000a, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        // AMD processor topology: extended APIC id, one thread per core, node 0 of 1.
        (0x8000_001e, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        }
    }

    fn vendor(name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        kvm_cpuid_entry2 {
            ebx: word(0),
            edx: word(4),
            ecx: word(8),
            ..Default::default()
        }
    }

    fn normalized_by(name: &[u8; 12], function: u32, index: u32, id: u8, count: u8) -> kvm_cpuid_entry2 {
        let supported = CpuId::from_entries(&[vendor(name), leaf(function, index)]).unwrap();
        normalize(&supported, id, count).as_slice()[1]
    }

    fn normalized(function: u32, index: u32, id: u8, count: u8) -> kvm_cpuid_entry2 {
        normalized_by(b"AuthenticAMD", function, index, id, count)
    }

    #[test]
    fn extended_leaves_of_amd_are_left_alone_on_other_processors() {
        for function in [0x8000_0001, 0x8000_0008, 0x8000_000a, 0x8000_001e, 0x8000_0022] {
            let untouched = leaf(function, 0);
            assert_eq!(normalized_by(b"GenuineIntel", function, 0, 1, 4), untouched);
            let amd = normalized(function, 0, 1, 4);
            assert_ne!(amd, untouched, "{function:#x}");
            assert_eq!(normalized_by(b"HygonGenuine", function, 0, 1, 4), amd);
        }
        assert_eq!(normalized(0x8000_0008, 0, 1, 4).ecx, 2 << 12 | 3);
    }

    #[test]
    fn features_hide_the_monitor_and_nesting_and_show_the_hypervisor() {
        let features = normalized(1, 0, 3, 4);
        assert_eq!(features.ebx >> 24, 3);
        assert_eq!(features.ebx >> 16 & 0xff, 4);
        assert_eq!(features.ecx >> 31, 1);
        assert_eq!(features.ecx >> 24 & 1, 1);
        assert_eq!(features.ecx & (1 << 5 | 1 << 15), 0);
        assert_eq!(features.edx >> 28 & 1, 1);
        assert_eq!(normalized(1, 0, 0, 1).edx >> 28 & 1, 0);
        assert_eq!(normalized(0xa, 0, 0, 1).eax, 0);
        assert_eq!(normalized(0x8000_0001, 0, 0, 1).ecx & (1 << 2), 0);
    }

    #[test]
    fn address_bits_are_those_of_the_host() {
        let bits = |eax: u32| {
            let mut entry = leaf(0x8000_0008, 0);
            entry.eax = eax;
            address_bits(&CpuId::from_entries(&[leaf(1, 0), entry]).unwrap())
        };
        assert_eq!([0x3030, 0x27, 0xff, 0].map(bits), [48, 39, 36, 36]);
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }

    #[test]
    fn topology_counts_cores_and_names_the_apic_id() {
        for count in 1..=32u8 {
            let threads = normalized(0xb, 0, count - 1, count);
            assert_eq!(
                (threads.eax, threads.ebx, threads.edx),
                (0, 1, u32::from(count) - 1)
            );
            let cores = normalized(0xb, 1, count - 1, count);
            assert_eq!(cores.ebx, u32::from(count));
            assert!(1u32 << cores.eax >= u32::from(count));
            assert_eq!(cores.ecx >> 8 & 0xff, 2);
            assert_eq!(normalized(0xb, 2, 0, count).ebx, 0);
        }
    }

    #[test]
    fn caches_are_private_up_to_the_second_level() {
        let mut entry = leaf(4, 3);
        entry.eax = 3 << 5 | 3;
        let supported = CpuId::from_entries(&[entry]).unwrap();
        let shared = normalize(&supported, 0, 4).as_slice()[0].eax;
        assert_eq!(shared >> 14 & 0xfff, 3);
        assert_eq!(shared >> 26, 3);
        entry.eax = 2 << 5 | 3;
        let supported = CpuId::from_entries(&[entry]).unwrap();
        assert_eq!(normalize(&supported, 0, 4).as_slice()[0].eax >> 14 & 0xfff, 0);
    }
}
