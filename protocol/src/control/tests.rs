#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use super::*;

fn config() -> VmConfig {
    VmConfig {
        version: VERSION,
        vcpus: 1,
        max_vcpus: 2,
        hotplug_mib: 1024,
        memory_mib: 128,
        kvm: Fd(0),
        start: Start::Kernel {
            kernel: Fd(1),
            command_line: String::new(),
        },
        guest_cid: 3,
        root: Fd(2),
        console: true,
        disk_slots: 2,
        disks: vec![(
            0,
            Disk {
                files: vec![Fd(3), Fd(4)],
                read_only: true,
            },
        )],
        net_slots: 2,
        nets: vec![Net {
            taps: vec![Fd(5), Fd(6)],
            vhosts: vec![Fd(7), Fd(8)],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        }],
        share: Some(Share { tag: "shared".into() }),
        vsock_listeners: vec![(1024, Fd(9))],
        balloon: true,
        seccomp: true,
    }
}

#[test]
fn message_and_descriptors_arrive_together() {
    let (a, b) = Channel::pair().unwrap();
    let sent = RequestMessage {
        id: 7,
        request: Request::Boot(Box::new(config())),
    };
    let file = File::open("/proc/self/stat").unwrap();
    a.send(&sent, &[file.as_fd()]).unwrap();
    let mut received: Received<RequestMessage> = b.receive().unwrap();
    assert_eq!(received.message, sent);
    let mut text = String::new();
    File::from(received.take(Fd(0)).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    assert!(!text.is_empty());
    assert!(matches!(received.take(Fd(0)), Err(ChannelError::MissingFd(0))));
    assert!(matches!(received.take(Fd(1)), Err(ChannelError::MissingFd(1))));
}

#[test]
fn closed_peer_is_told_apart_from_garbage() {
    let (a, b) = Channel::pair().unwrap();
    a.send(&"not a request", &[]).unwrap();
    assert!(matches!(
        b.receive::<RequestMessage>(),
        Err(ChannelError::Decode(_))
    ));
    drop(a);
    assert!(matches!(b.receive::<RequestMessage>(), Err(ChannelError::Closed)));
    assert!(matches!(b.send(&1, &[]), Err(ChannelError::Closed)));
}

#[test]
fn oversized_message_is_refused_before_it_is_sent() {
    let (a, _b) = Channel::pair().unwrap();
    let error = a.send(&"x".repeat(MAX_MESSAGE), &[]).unwrap_err();
    assert!(matches!(error, ChannelError::TooLarge { .. }));
}

#[test]
fn unknown_configuration_field_is_refused_by_name() {
    let mut json = serde_json::to_value(config()).unwrap();
    json["memory"] = 5.into();
    let error = serde_json::from_value::<VmConfig>(json).unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
}

#[test]
fn interfaces_have_a_pair_of_queues_for_each_vcpu_up_to_a_limit() {
    let pairs = [0, 1, 2, 3, 4, 5, 32, u8::MAX].map(queue_pairs);
    assert_eq!(pairs, [1, 1, 2, 3, 4, 4, 4, 4]);
}
