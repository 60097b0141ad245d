#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use protobuf::{CodedOutputStream, Message};

use crate::api::*;

/// A field of bytes as it is on the wire.
fn field(number: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut bytes);
    stream.write_bytes(number, value).unwrap();
    stream.flush().unwrap();
    drop(stream);
    bytes
}

/// Numbers of the fields of a message, in their order on the wire.
fn numbers(bytes: &[u8]) -> Vec<u64> {
    let mut stream = protobuf::CodedInputStream::from_bytes(bytes);
    let mut found = Vec::new();
    while let Some(tag) = stream.read_raw_tag_or_eof().unwrap() {
        found.push(u64::from(tag >> 3));
        let length = stream.read_raw_varint32().unwrap();
        stream.skip_raw_bytes(length).unwrap();
    }
    found
}

#[test]
fn a_container_has_containerds_numbers() {
    let container = Container {
        id: "a".to_owned(),
        labels: HashMap::from([("k".to_owned(), "v".to_owned())]),
        image: "i".to_owned(),
        runtime: Some(Runtime {
            name: "io.containerd.kata.v2".to_owned(),
            ..Runtime::default()
        })
        .into(),
        spec: Some(Any {
            type_url: "t".to_owned(),
            ..Any::default()
        })
        .into(),
        snapshotter: "s".to_owned(),
        snapshot_key: "a".to_owned(),
        sandbox: "p".to_owned(),
        ..Container::default()
    };
    let mut found = numbers(&container.write_to_bytes().unwrap());
    found.sort_unstable();
    assert_eq!(found, [1, 2, 3, 4, 5, 6, 7, 11]);
}

#[test]
fn what_is_not_named_survives_a_copy() {
    let options = [field(1, b"runtimeoptions.v1.Options"), field(2, b"\x12\x01/")].concat();
    let runtime = [field(1, b"io.containerd.kata.v2"), field(2, &options)].concat();
    let created = [0x08, 0x07];
    let extension = [field(1, b"nerdctl"), field(2, &field(1, b"type"))].concat();
    let wire = [
        field(1, b"old"),
        field(4, &runtime),
        field(8, &created),
        field(10, &extension),
        // One that does not exist yet.
        field(77, b"later"),
    ]
    .concat();
    let mut container = Container::parse_from_bytes(&wire).unwrap();
    assert_eq!(container.runtime.options.type_url, "runtimeoptions.v1.Options");
    container.id = "new".to_owned();
    let kept = Records {
        records: vec![Record {
            container: Some(container).into(),
            ..Record::default()
        }],
        ..Records::default()
    };
    let again = Records::parse_from_bytes(&kept.write_to_bytes().unwrap()).unwrap();
    let wire = again.records[0].container.write_to_bytes().unwrap();
    for part in [
        field(1, b"new"),
        field(4, &runtime),
        field(8, &created),
        field(10, &extension),
        field(77, b"later"),
    ] {
        assert!(wire.windows(part.len()).any(|window| window == part), "{part:?}");
    }
}

#[test]
fn a_call_that_nobody_answers_names_the_socket() {
    let client = crate::Client::new("/nonexistent/containerd.sock".into(), "default".to_owned());
    let status = client.container(&ContainerId::default()).unwrap_err();
    assert_eq!(status.code, 2);
    assert!(
        status
            .message
            .contains("/nonexistent/containerd.sock: No such file"),
        "{status}"
    );
}
