//! The kernel command line.

use crate::arch::layout;
use crate::virtio::mmio::Slot;

/// Builds the command line. `slots` are the virtio devices in the order in which the kernel shall probe
/// them, `extra` comes last and so wins over what stands before it.
pub fn build(console: bool, vcpus: u8, max_vcpus: u8, hotplug: bool, slots: &[Slot], extra: &str) -> String {
    let mut words: Vec<String> = [
        // Reset through the keyboard controller, the one reset line there is; after a panic at once,
        // and marked as warm so that the VMM can tell (see `ports`).
        "reboot=k,panic_warm",
        "panic=-1",
        // The timer is KVM's and the TSC is steady: no calibration against a timer that is not there.
        "no_timer_check",
        "tsc=reliable",
        // No console output but warnings: each byte of it is an exit.
        "quiet",
        // The root image: EROFS in persistent memory, its pages used in place.
        "root=/dev/pmem0",
        "rootfstype=erofs",
        "rootflags=dax=always",
        "ro",
        // Per-CPU memory page by page. In units of 2 MiB, as it is otherwise, the second chunk of it, which the first
        // container needs, comes with 4 MiB of bookkeeping.
        "percpu_alloc=page",
        // Free memory is told to the balloon in pieces of 256 KiB and more, not of 2 MiB: the host gives memory in pages of
        // 2 MiB, and a booted guest has holes in many of them.
        "page_reporting.page_reporting_order=6",
        // The kernel's driver would make an interface that nobody has asked for.
        "dummy.numdummies=0",
    ]
    .map(String::from)
    .to_vec();
    words.push(if console {
        "console=ttyS0".into()
    } else {
        "8250.nr_uarts=0".into()
    });
    if vcpus < max_vcpus {
        words.push(format!("maxcpus={vcpus}"));
    }
    if hotplug {
        // Added memory holds what can be moved away, as far as the kernel can do with so little of its own: pages of
        // the kernel would keep it from being given back.
        words.push("memory_hotplug.online_policy=auto-movable".into());
    }
    words.extend(slots.iter().map(|slot| {
        format!(
            "virtio_mmio.device={:#x}@{:#x}:{}",
            layout::VIRTIO_MMIO_SIZE,
            slot.address(),
            slot.gsi()
        )
    }));
    words.extend(extra.split_whitespace().map(String::from));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn devices_and_extra_words_come_last() {
        let slots = [Slot::new(0).unwrap(), Slot::new(1).unwrap()];
        let line = build(true, 1, 2, false, &slots, " a=b\n c ");
        assert!(line.ends_with(
            "console=ttyS0 maxcpus=1 virtio_mmio.device=0x1000@0xc0000000:5 \
             virtio_mmio.device=0x1000@0xc0001000:6 a=b c"
        ));
        assert!(!build(false, 2, 2, false, &[], "").contains("maxcpus"));
        assert!(build(false, 2, 2, true, &[], "").contains("=auto-movable"));
    }
}
