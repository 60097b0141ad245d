#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::mem::offset_of;

use super::*;

#[test]
fn structures_have_the_kernels_layout() {
    assert_eq!(
        (offset_of!(RingState, index), offset_of!(RingState, number)),
        (0, 4)
    );
    assert_eq!((offset_of!(RingFile, index), offset_of!(RingFile, fd)), (0, 4));
    let address = [
        offset_of!(RingAddress, index),
        offset_of!(RingAddress, flags),
        offset_of!(RingAddress, descriptors),
        offset_of!(RingAddress, used),
        offset_of!(RingAddress, available),
        offset_of!(RingAddress, log),
    ];
    assert_eq!(address, [0, 4, 8, 16, 24, 32]);
    let region = |guest, size, host| Region {
        guest,
        size,
        host,
        flags: 0,
    };
    let table = memory_table(&[
        region(0, 1 << 20, 0x7000_0000),
        region(4 << 30, 2 << 20, 0x9000_0000),
    ]);
    let words = [2, 0, 1 << 20, 0x7000_0000, 0, 4 << 30, 2 << 20, 0x9000_0000, 0];
    assert_eq!(table, words);
}

/// Values of linux/vhost.h, in the order of [`Operation`].
#[test]
fn operations_have_the_kernels_numbers() {
    let state = RingState { index: 0, number: 0 };
    let file = RingFile { index: 0, fd: 0 };
    let address = RingAddress {
        index: 0,
        flags: 0,
        descriptors: 0,
        used: 0,
        available: 0,
        log: 0,
    };
    let numbers = [
        (Operation::GetFeatures, 0x8008_af00),
        (Operation::SetOwner, 0xaf01),
        (Operation::SetFeatures(0), 0x4008_af00),
        (Operation::SetMemory(Vec::new()), 0x4008_af03),
        (Operation::SetSize(state), 0x4008_af10),
        (Operation::SetAddress(address), 0x4028_af11),
        (Operation::SetBase(state), 0x4008_af12),
        (Operation::GetBase(0), 0xc008_af12),
        (Operation::SetKick(file), 0x4008_af20),
        (Operation::SetCall(file), 0x4008_af21),
        (Operation::SetError(file), 0x4008_af22),
        (Operation::SetBackend(file), 0x4008_af30),
    ];
    for (operation, number) in numbers {
        assert_eq!(operation.number(), number, "{operation:?}");
        let error = operation.perform(File::open("/dev/null").unwrap().as_raw_fd());
        assert_eq!(
            error.unwrap_err().raw_os_error(),
            Some(libc::ENOTTY),
            "{operation:?}"
        );
    }
}

#[test]
fn what_is_no_such_device_is_refused() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for file in [File::open("/dev/null").unwrap().into(), stream.into()] {
        let error = Vhost::new(file).unwrap().take().unwrap_err();
        assert_eq!(error.to_string(), "vhost-net cannot start its worker");
        let VhostError::Refused { source, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::ENOTTY));
    }
}

#[test]
fn a_device_is_taken_when_it_has_what_is_needed() {
    let fake = fake::Fake::default();
    let mut vhost = fake.device();
    assert_eq!(fake.take_operations(), []);
    vhost.take().unwrap();
    vhost.take().unwrap();
    assert_eq!(
        fake.take_operations(),
        [Operation::SetOwner, Operation::GetFeatures]
    );
    let merging = 1 << VIRTIO_NET_F_MRG_RXBUF;
    let fake = fake::Fake::without(merging);
    let error = fake.device().take().unwrap_err();
    assert!(
        matches!(error, VhostError::Features(lacking) if lacking == merging),
        "{error:?}"
    );
    fake::Fake::without(!FEATURES).device().take().unwrap();
}
