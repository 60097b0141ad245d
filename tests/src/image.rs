//! Makes the suite's second image: the busybox image with one layer more, which holds the probe.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::session::Session;

/// Name of the image that holds the probe as `/probe`.
pub const PROBE_IMAGE: &str = "bulkhead.test/probe:latest";
/// A file of the added layer, and what is in it.
pub const MARKER: (&str, &str) = ("/etc/bulkhead-layer", "from the second layer\n");

/// Writes the probe image to `directory/probe.tar` and its unpacked root to `directory/rootfs`;
/// returns both paths.
///
/// # Panics
/// If `base` is not an OCI layout with one image manifest.
#[must_use]
pub fn build(base: &Path, probe: &Path, directory: &Path) -> (PathBuf, PathBuf) {
    let (layout, layer, rootfs) = (
        directory.join("layout"),
        directory.join("layer"),
        directory.join("rootfs"),
    );
    for path in [&layout, &rootfs, &layer.join("etc")] {
        fs::create_dir_all(path).expect("a directory");
    }
    tar(&["-xf", path(base), "-C", path(&layout)]);

    let copied = fs::copy(probe, layer.join("probe"));
    copied.unwrap_or_else(|error| panic!("the probe {}: {error}", probe.display()));
    write(&layer.join(MARKER.0.trim_start_matches('/')), MARKER.1.as_bytes());
    write(
        &layer.join("etc/passwd"),
        b"root:x:0:0:root:/root:/bin/sh\ntester:x:1234:2345::/:/bin/sh\n",
    );
    write(
        &layer.join("etc/group"),
        b"root:x:0:\ntester:x:2345:\nextra:x:3456:tester\n",
    );
    let layer_tar = directory.join("layer.tar");
    tar(&["-cf", path(&layer_tar), "-C", path(&layer), "."]);
    let layer_bytes = fs::read(&layer_tar).expect("the layer");

    let mut index = read_json(&layout.join("index.json"));
    let manifest_digest = index["manifests"][0]["digest"]
        .as_str()
        .expect("a manifest")
        .to_owned();
    let mut manifest = read_json(&blob_path(&layout, &manifest_digest));
    let layers = manifest["layers"]
        .as_array_mut()
        .expect("one image manifest, not an index of several");
    for base_layer in &*layers {
        let blob = blob_path(&layout, base_layer["digest"].as_str().expect("a digest"));
        tar(&["-xf", path(&blob), "-C", path(&rootfs)]);
    }
    tar(&["-xf", path(&layer_tar), "-C", path(&rootfs)]);

    let descriptor = add_blob(&layout, &layer_bytes, "application/vnd.oci.image.layer.v1.tar");
    let diff_id = descriptor["digest"].clone();
    layers.push(descriptor);
    let mut config = read_json(&blob_path(
        &layout,
        manifest["config"]["digest"].as_str().expect("a digest"),
    ));
    config["rootfs"]["diff_ids"]
        .as_array_mut()
        .expect("diff_ids")
        .push(diff_id);
    if let Some(history) = config.as_object_mut() {
        // It would have to have as many entries as there are layers.
        history.remove("history");
    }
    manifest["config"] = add_blob(
        &layout,
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    );
    let mut entry = add_blob(
        &layout,
        manifest.to_string().as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    );
    entry["annotations"] = json!({ "io.containerd.image.name": PROBE_IMAGE });
    index["manifests"] = json!([entry]);
    write(&layout.join("index.json"), index.to_string().as_bytes());

    let image = directory.join("probe.tar");
    tar(&["-cf", path(&image), "-C", path(&layout), "."]);
    for done in [layout, layer] {
        fs::remove_dir_all(done).expect("the directory was just made");
    }
    fs::remove_file(layer_tar).expect("the file was just made");
    (image, rootfs)
}

fn add_blob(layout: &Path, bytes: &[u8], media_type: &str) -> Value {
    let hash: String = hmac_sha256::Hash::hash(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let digest = format!("sha256:{hash}");
    write(&blob_path(layout, &digest), bytes);
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

fn blob_path(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs").join(digest.replace(':', "/"))
}

fn read_json(file: &Path) -> Value {
    let bytes = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn write(file: &Path, bytes: &[u8]) {
    fs::write(file, bytes).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

fn path(path: &Path) -> &str {
    path.to_str().expect("paths of the suite are UTF-8")
}

fn tar(arguments: &[&str]) {
    let mut command = Command::new("tar");
    command.args(arguments);
    let _ = Session::start(command, Duration::from_secs(300))
        .finish()
        .expect_code(0);
}
