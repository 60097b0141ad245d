#![allow(clippy::unwrap_used)]

use bulkhead_containerd::api::Snapshot;
use serde_json::json;

use super::*;
use crate::fake::{manifest, saved};

fn record(id: &str, spec: &Value) -> Record {
    let labels = [
        ("io.containerd.image.config.stop-signal", "SIGTERM"),
        ("nerdctl/name", "web"),
        ("containerd.io/restart.status", "running"),
    ];
    let of_root = [
        ("containerd.io/snapshot/size", "1"),
        ("containerd.io/snapshot.ref", "x"),
        ("containerd.io/gc.root", "x"),
    ];
    let map = |labels: &[(&str, &str)]| {
        let pairs = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        pairs.collect()
    };
    Record {
        container: Some(Container {
            id: id.to_owned(),
            labels: map(&labels),
            image: "busybox".to_owned(),
            spec: Some(Any {
                type_url: "spec".to_owned(),
                value: spec.to_string().into_bytes(),
                ..Any::default()
            })
            .into(),
            snapshotter: "overlayfs".to_owned(),
            snapshot_key: format!("{id}-key"),
            ..Container::default()
        })
        .into(),
        root: Some(Snapshot {
            name: format!("{id}-key"),
            parent: format!("layers of {id}"),
            kind: SnapshotKind::ACTIVE.into(),
            labels: map(&of_root),
            ..Snapshot::default()
        })
        .into(),
        ..Record::default()
    }
}

fn records(records: Vec<Record>) -> Records {
    Records {
        records,
        ..Records::default()
    }
}

const WANTED: Wanted<'_> = Wanted {
    snapshot: "warm",
    id: "new",
    network: None,
    log: None,
};

fn spec_of(planned: &Planned) -> Value {
    specification(&planned.container).unwrap()
}

#[test]
fn a_container_alone_is_the_pod_whatever_its_name() {
    let manifest = manifest("old", vec![saved("old", None, true)]);
    let spec = json!({"hostname": "h", "linux": {"cgroupsPath": "/n/old"}, "process": {"terminal": true}});
    let records = records(vec![record("old", &spec)]);
    let wanted = Wanted {
        log: Some(Path::new("/var/log/ü b")),
        ..WANTED
    };
    let planned = plan(&manifest, &records, &wanted).unwrap();
    let [alone] = planned.as_slice() else {
        panic!("{planned:?}")
    };
    let container = &alone.container;
    assert_eq!(
        (container.id.as_str(), container.snapshot_key.as_str()),
        ("new", "new")
    );
    assert_eq!(
        (container.image.as_str(), container.spec.type_url.as_str()),
        ("busybox", "spec")
    );
    let labels: Vec<_> = container.labels.keys().collect();
    assert_eq!(labels, ["io.containerd.image.config.stop-signal"]);
    assert_eq!(
        spec_of(alone),
        json!({
            "annotations": {ANNOTATION: "warm"},
            "linux": {"cgroupsPath": "/n/new"},
            "process": {"terminal": true},
        })
    );
    let root = alone.root.as_ref().unwrap();
    assert!(root.writable);
    assert_eq!(
        (
            root.request.snapshotter.as_str(),
            root.request.key.as_str(),
            root.request.parent.as_str()
        ),
        ("overlayfs", "new", "layers of old")
    );
    let labels: Vec<_> = root.request.labels.keys().collect();
    assert_eq!(labels, ["containerd.io/snapshot/size"]);
    assert!(alone.terminal);
    assert_eq!(alone.output, "file:///var/log/%C3%BC%20b/new.log");
}

#[test]
fn the_sandbox_comes_first_and_its_containers_are_in_the_new_one() {
    let manifest = manifest(
        "old",
        vec![saved("c2", Some("side"), false), saved("c1", None, false)],
    );
    let of = |kind: &str| json!({"annotations": {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "old"}});
    let mut sandbox = record("old", &of("sandbox"));
    sandbox.container.as_mut().unwrap().snapshot_key.clear();
    sandbox.root = None.into();
    let mut view = record("c2", &of("container"));
    view.root.as_mut().unwrap().kind = SnapshotKind::VIEW.into();
    let records = records(vec![sandbox, view, record("c1", &of("container"))]);
    let wanted = Wanted {
        log: Some(Path::new("/log")),
        ..WANTED
    };
    let planned = plan(&manifest, &records, &wanted).unwrap();
    let ids: Vec<_> = planned.iter().map(Planned::id).collect();
    assert_eq!(ids, ["new", "new-side", "new-1"]);
    for planned in &planned {
        let annotations = &spec_of(planned)["annotations"];
        assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "new");
        assert_eq!(annotations.get(ANNOTATION).is_some(), planned.id() == "new");
    }
    assert!(planned[0].root.is_none() && planned[0].output.is_empty());
    assert!(!planned[1].root.as_ref().unwrap().writable);
    assert_eq!(planned[2].output, "file:///log/new-1.log");
}

#[test]
fn a_record_that_is_missing_is_named() {
    let manifest = manifest("old", vec![saved("c1", Some("a"), false)]);
    let error = plan(&manifest, &records(vec![record("old", &json!({}))]), &WANTED).unwrap_err();
    assert!(error.to_string().contains("no record of container c1"), "{error}");
    let mut lost = record("c1", &json!({}));
    lost.root = None.into();
    let error = plan(
        &manifest,
        &records(vec![record("old", &json!({})), lost]),
        &WANTED,
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("c1 has no root file system"),
        "{error}"
    );
}

#[test]
fn what_others_have_to_know_of_is_refused() {
    let manifest = manifest("old", vec![saved("old", None, false)]);
    let refused = |record: Record, wanted: &Wanted<'_>| {
        plan(&manifest, &records(vec![record]), wanted).map_err(|error| error.to_string())
    };
    let mut labelled = record("old", &json!({}));
    let labels = &mut labelled.container.as_mut().unwrap().labels;
    labels.insert("io.cri-containerd.kind".to_owned(), "container".to_owned());
    let mut in_sandbox = record("old", &json!({}));
    in_sandbox.container.as_mut().unwrap().sandbox = "s".to_owned();
    for record in [labelled, in_sandbox] {
        let error = refused(record, &WANTED).unwrap_err();
        assert!(
            error.contains("through CRI") && error.contains(ANNOTATION),
            "{error}"
        );
    }
    let network = json!({"linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}]}});
    let error = refused(record("old", &network), &WANTED).unwrap_err();
    assert!(
        error.contains("/run/netns/x") && error.contains("--netns"),
        "{error}"
    );
    let wanted = Wanted {
        network: Some("/run/netns/y"),
        ..WANTED
    };
    let planned = refused(record("old", &network), &wanted).unwrap();
    assert_eq!(
        spec_of(&planned[0])["linux"]["namespaces"][0]["path"],
        "/run/netns/y"
    );
}

#[test]
fn new_ids_differ_and_are_ids() {
    let long = "a".repeat(38) + "-_b" + &"c".repeat(30);
    for (old, base) in [
        ("web", "web"),
        ("a.b_c", "a.b_c"),
        (long.as_str(), &"a".repeat(38)),
    ] {
        let id = new_id(old).unwrap();
        let digits = id
            .strip_prefix(base)
            .and_then(|rest| rest.strip_prefix('-'))
            .unwrap();
        assert!(
            digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{id}"
        );
        assert_ne!(new_id(old).unwrap(), id);
    }
}
