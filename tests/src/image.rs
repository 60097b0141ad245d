//! Makes the suites' images: the busybox image with one layer more.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::session::Session;

/// Name of the image that holds the probe as `/probe`.
pub const PROBE_IMAGE: &str = "bulkhead.test/probe:latest";
/// The sandbox image of CRI. Only other runtimes than ours run its program.
pub const PAUSE_IMAGE: &str = "bulkhead.test/pause:latest";
/// The probe's image with a user, a directory, a variable and a stop signal: see [`CONFIGURED`].
pub const CONFIGURED_IMAGE: &str = "bulkhead.test/configured:latest";
/// The probe's image with `/setuid`, the probe with the bits for user and group and another owner.
pub const SETUID_IMAGE: &str = "bulkhead.test/setuid:latest";
/// An nginx that serves [`NGINX_PAGE`] on port 80; there only if the host has Debian's `nginx`.
pub const NGINX_IMAGE: &str = "bulkhead.test/nginx:latest";
/// The page.
pub const NGINX_PAGE: &str = "served by nginx\n";
/// A file of the probe's layer, and what is in it.
pub const MARKER: (&str, &str) = ("/etc/bulkhead-layer", "from the second layer\n");

/// An image in an archive.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// OCI layout tar.
    pub archive: PathBuf,
}

/// Writes the probe image to `directory/probe.tar` and its unpacked root to `directory/rootfs`;
/// returns both paths.
///
/// # Panics
/// If `base` is not an OCI layout with one image manifest.
#[must_use]
pub fn build(base: &Path, probe: &Path, directory: &Path) -> (PathBuf, PathBuf) {
    let rootfs = directory.join("rootfs");
    fs::create_dir_all(&rootfs).expect("a directory");
    let layer = probe_layer(probe, directory);
    let image = derive(base, PROBE_IMAGE, &layer, json!({}), directory, Some(&rootfs));
    fs::remove_dir_all(layer).expect("the directory was just made");
    (image.archive, rootfs)
}

/// Writes the images that only the suite of CRI uses.
///
/// # Panics
/// As [`build`].
#[must_use]
pub fn for_pods(base: &Path, probe: &Path, directory: &Path) -> Vec<Image> {
    let layer = probe_layer(probe, directory);
    let mut images = vec![derive(
        base,
        PAUSE_IMAGE,
        &layer,
        json!({"Entrypoint": ["/bin/sleep", "1000000"], "Cmd": null}),
        directory,
        None,
    )];
    images.push(derive(
        base,
        CONFIGURED_IMAGE,
        &layer,
        json!({
            "User": "tester",
            "WorkingDir": "/var/lib/somewhere",
            "Env": ["PATH=/usr/bin:/bin", "FROM_IMAGE=yes"],
            "Entrypoint": ["/probe"],
            "Cmd": ["trap", "0"],
            "StopSignal": "SIGUSR1",
        }),
        directory,
        None,
    ));
    let setuid = layer.join("setuid");
    fs::copy(probe, &setuid).expect("the probe");
    std::os::unix::fs::chown(&setuid, Some(0), Some(2345)).expect("root may");
    fs::set_permissions(&setuid, fs::Permissions::from_mode(0o6755)).expect("root may");
    images.push(derive(base, SETUID_IMAGE, &layer, json!({}), directory, None));
    fs::remove_dir_all(&layer).expect("the directory was just made");
    if Path::new(NGINX).exists() {
        let layer = nginx_layer(directory);
        let command = json!({"Cmd": [NGINX, "-g", "daemon off;"], "StopSignal": "SIGQUIT"});
        images.push(derive(base, NGINX_IMAGE, &layer, command, directory, None));
        fs::remove_dir_all(&layer).expect("the directory was just made");
    }
    images
}

fn probe_layer(probe: &Path, directory: &Path) -> PathBuf {
    let layer = directory.join("layer");
    for made in ["etc", "var/lib/somewhere"] {
        fs::create_dir_all(layer.join(made)).expect("a directory");
    }
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
    layer
}

const NGINX: &str = "/usr/sbin/nginx";

/// The host's nginx with the libraries it is linked to.
fn nginx_layer(directory: &Path) -> PathBuf {
    let layer = directory.join("nginx");
    // With this variable the dynamic loader lists what it would load; it is what ldd sets.
    let mut loader = Command::new(NGINX);
    loader.env("LD_TRACE_LOADED_OBJECTS", "1");
    let listing = Session::start(loader, Duration::from_secs(60)).finish().text();
    let libraries = listing
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned);
    for file in libraries.chain([NGINX.to_owned()]) {
        let target = layer.join(file.trim_start_matches('/'));
        fs::create_dir_all(target.parent().expect("a file has a parent")).expect("a directory");
        let copied = fs::copy(&file, target);
        copied.unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    for made in ["etc/nginx", "var/log/nginx", "var/lib/nginx", "srv", "run"] {
        fs::create_dir_all(layer.join(made)).expect("a directory");
    }
    write(
        &layer.join("etc/nginx/nginx.conf"),
        b"user root root;\nworker_processes 1;\npid /run/nginx.pid;\nerror_log /dev/stderr;\nevents {}\n\
          http { access_log off; server { listen 80; listen [::]:80; root /srv; } }\n",
    );
    write(&layer.join("srv/index.html"), NGINX_PAGE.as_bytes());
    symlink("/proc/self/fd/2", layer.join("var/log/nginx/error.log")).expect("a link");
    layer
}

/// Writes the image `name`: `base` with a layer more and some keys of its configuration changed. With `rootfs` its
/// layers are unpacked there.
fn derive(
    base: &Path,
    name: &str,
    layer: &Path,
    changes: Value,
    directory: &Path,
    rootfs: Option<&Path>,
) -> Image {
    let layout = directory.join("layout");
    fs::create_dir_all(&layout).expect("a directory");
    tar(&["-xf", path(base), "-C", path(&layout)]);
    let layer_tar = directory.join("layer.tar");
    tar(&["-cf", path(&layer_tar), "-C", path(layer), "."]);
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
    if let Some(rootfs) = rootfs {
        for base_layer in &*layers {
            let blob = blob_path(&layout, base_layer["digest"].as_str().expect("a digest"));
            tar(&["-xf", path(&blob), "-C", path(rootfs)]);
        }
        tar(&["-xf", path(&layer_tar), "-C", path(rootfs)]);
    }

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
    for (key, value) in changes.as_object().expect("keys and values") {
        config["config"][key] = value.clone();
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
    entry["annotations"] = json!({ "io.containerd.image.name": name });
    index["manifests"] = json!([entry]);
    write(&layout.join("index.json"), index.to_string().as_bytes());

    let file = name.rsplit('/').next().unwrap_or(name).replace(":latest", ".tar");
    let archive = directory.join(file);
    tar(&["-cf", path(&archive), "-C", path(&layout), "."]);
    fs::remove_dir_all(layout).expect("the directory was just made");
    fs::remove_file(layer_tar).expect("the file was just made");
    Image {
        name: name.to_owned(),
        archive,
    }
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
