//! Every message of the control socket arrives as it was sent.

#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;

use bulkhead_protocol::control::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn fd() -> impl Strategy<Value = Fd> {
    any::<u16>().prop_map(Fd)
}

fn disk() -> impl Strategy<Value = Disk> {
    (vec(fd(), 0..4), any::<bool>()).prop_map(|(files, read_only)| Disk { files, read_only })
}

fn net() -> impl Strategy<Value = Net> {
    let fds = (vec(fd(), 0..5), vec(fd(), 0..5));
    (fds, any::<[u8; 6]>(), any::<u16>()).prop_map(|((taps, vhosts), mac, mtu)| Net {
        taps,
        vhosts,
        mac,
        mtu,
    })
}

fn share() -> impl Strategy<Value = Share> {
    ".{0,40}".prop_map(|tag| Share { tag })
}

fn start() -> impl Strategy<Value = Start> {
    prop_oneof![
        (fd(), ".{0,60}").prop_map(|(kernel, command_line)| Start::Kernel { kernel, command_line }),
        (fd(), fd(), option::of((fd(), fd()))).prop_map(|(state, memory, written)| Start::Snapshot {
            state,
            memory,
            written: written.map(|(first, later)| Written { first, later }),
        }),
    ]
}

fn config() -> impl Strategy<Value = VmConfig> {
    let size = (any::<[u32; 6]>(), any::<[u8; 2]>(), any::<[bool; 3]>());
    let places = (fd(), start(), fd());
    let disks = vec((any::<u32>(), disk()), 0..4);
    let listeners = vec((any::<u32>(), fd()), 0..4);
    (
        size,
        places,
        disks,
        vec(net(), 0..3),
        option::of(share()),
        listeners,
    )
        .prop_map(
            |((numbers, vcpus, flags), (kvm, start, root), disks, nets, share, vsock_listeners)| {
                let [version, memory_mib, hotplug_mib, disk_slots, net_slots, guest_cid] = numbers;
                VmConfig {
                    version,
                    vcpus: vcpus[0],
                    max_vcpus: vcpus[1],
                    memory_mib,
                    hotplug_mib,
                    kvm,
                    start,
                    root,
                    console: flags[0],
                    disk_slots,
                    disks,
                    net_slots,
                    nets,
                    share,
                    guest_cid,
                    vsock_listeners,
                    balloon: flags[1],
                    seccomp: flags[2],
                }
            },
        )
}

fn request() -> impl Strategy<Value = Request> {
    let number = any::<u32>();
    prop_oneof![
        config().prop_map(|config| Request::Boot(Box::new(config))),
        Just(Request::Pause),
        Just(Request::Resume),
        (number, fd()).prop_map(|(port, far_end)| Request::VsockListen { port, far_end }),
        number.prop_map(|port| Request::VsockUnlisten { port }),
        (number, fd()).prop_map(|(port, far_end)| Request::VsockConnect { port, far_end }),
        (number, disk()).prop_map(|(slot, disk)| Request::AttachDisk { slot, disk }),
        number.prop_map(|slot| Request::DetachDisk { slot }),
        (number, net()).prop_map(|(slot, net)| Request::AttachNet { slot, net }),
        number.prop_map(|slot| Request::DetachNet { slot }),
        number.prop_map(|mib| Request::SetBalloon { mib }),
        any::<u8>().prop_map(|count| Request::AddVcpus { count }),
        number.prop_map(|mib| Request::SetMemory { mib }),
        (fd(), fd(), fd()).prop_map(|(state, memory, pagemap)| Request::Snapshot {
            state,
            memory,
            pagemap,
        }),
        (fd(), fd()).prop_map(|(list, pagemap)| Request::ListWritten { list, pagemap }),
        Just(Request::Inspect),
    ]
}

fn boot_times() -> impl Strategy<Value = BootTimes> {
    any::<[u64; 6]>().prop_map(
        |[started, configured, memory, kernel, devices, running]| BootTimes {
            started,
            configured,
            memory,
            kernel,
            devices,
            running,
        },
    )
}

fn inspection() -> impl Strategy<Value = Inspection> {
    let device = (".{0,8}", any::<u8>()).prop_map(|(name, status)| DeviceStatus { name, status });
    (any::<bool>(), ".{0,80}", vec(device, 0..4)).prop_map(|(paused, console, devices)| Inspection {
        paused,
        console,
        devices,
    })
}

fn event() -> impl Strategy<Value = Event> {
    let number = any::<u32>();
    let reason = prop_oneof![
        Just(ExitReason::PowerOff),
        Just(ExitReason::Reboot),
        Just(ExitReason::Panic),
        Just(ExitReason::TripleFault),
        ".{0,40}".prop_map(ExitReason::KvmError),
        ".{0,40}".prop_map(ExitReason::VmmError),
    ];
    prop_oneof![
        number.prop_map(|port| Event::VsockConnected { port }),
        (number, any::<u64>()).prop_map(|(port, monotonic_us)| Event::VsockFirstData { port, monotonic_us }),
        number.prop_map(|port| Event::VsockClosed { port }),
        number.prop_map(|mib| Event::MemorySize { mib }),
        (reason, ".{0,80}").prop_map(|(reason, console)| Event::Exited(Exit { reason, console })),
    ]
}

fn message() -> impl Strategy<Value = VmmMessage> {
    let reply = prop_oneof![
        Just(Reply::Done),
        (boot_times(), vec(".{0,8}", 0..4))
            .prop_map(|(times, devices)| Reply::Booted(Booted { times, devices })),
        inspection().prop_map(Reply::Inspected),
    ];
    let result = prop_oneof![reply.prop_map(Ok), ".{0,60}".prop_map(Err)];
    prop_oneof![
        (any::<u64>(), result).prop_map(|(id, result)| VmmMessage::Reply { id, result }),
        event().prop_map(VmmMessage::Event),
    ]
}

proptest! {
    #[test]
    fn requests_arrive_as_they_were_sent(id in any::<u64>(), request in request(), files in 0usize..8) {
        let (ours, theirs) = Channel::pair().unwrap();
        let sent = RequestMessage { id, request };
        let null = std::fs::File::open("/dev/null").unwrap();
        ours.send(&sent, &vec![null.as_fd(); files]).unwrap();
        let mut received: Received<RequestMessage> = theirs.receive().unwrap();
        prop_assert_eq!(&received.message, &sent);
        // Each descriptor can be taken once, and there is none more.
        for index in 0..files {
            prop_assert!(received.take(Fd(index as u16)).is_ok());
            prop_assert!(received.take(Fd(index as u16)).is_err());
        }
        prop_assert!(received.take(Fd(files as u16)).is_err());
    }

    #[test]
    fn answers_and_events_arrive_as_they_were_sent(sent in message()) {
        let (ours, theirs) = Channel::pair().unwrap();
        theirs.send(&sent, &[]).unwrap();
        let received: Received<VmmMessage> = ours.receive().unwrap();
        prop_assert_eq!(received.message, sent);
    }
}
