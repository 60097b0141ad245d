//! A container image of busybox, in the OCI layout, made without a container builder.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cache::{self, Key, hexadecimal};
use crate::process;

/// The name under which it is imported.
pub const NAME: &str = "docker.io/library/busybox:latest";

const DIRECTORIES: [&str; 9] = [
    "bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr/bin", "var",
];

/// The path of the image as a tar archive, made unless it is cached.
///
/// # Errors
/// `busybox` does not run or a file cannot be written.
pub fn busybox(busybox: &Path) -> Result<PathBuf> {
    let key = Key::new()
        .with(include_str!("image.rs"))
        .with_file(busybox)?
        .text();
    let entry = cache::entry("image", &key, || (), |directory| make(directory, busybox))?;
    Ok(entry.join("busybox.tar"))
}

fn make(directory: &Path, busybox: &Path) -> Result<()> {
    let root = directory.join("root");
    for name in DIRECTORIES {
        fs::create_dir_all(root.join(name)).with_context(|| format!("cannot create {name}"))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).context("cannot set a mode")?;
    fs::copy(busybox, root.join("bin/busybox")).context("cannot copy busybox")?;
    let applets =
        process::output(Command::new(busybox).arg("--list")).context("cannot list busybox's applets")?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).with_context(|| format!("cannot link {applet}"))?;
    }
    let users = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    fs::write(root.join("etc/passwd"), users).context("cannot write etc/passwd")?;
    let groups = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";
    fs::write(root.join("etc/group"), groups).context("cannot write etc/group")?;

    let layer = directory.join("layer.tar");
    archive(&root, &layer)?;
    let layer = fs::read(&layer).context("cannot read the layer")?;

    let layout = directory.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).context("cannot create the layout")?;
    let layer = blob(&blobs, "application/vnd.oci.image.layer.v1.tar", &layer)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = blob(
        &blobs,
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    )?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
    let mut manifest = blob(&blobs, kind, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"io.containerd.image.name": NAME});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).context("cannot write the index")?;
    fs::write(
        layout.join("oci-layout"),
        json!({"imageLayoutVersion": "1.0.0"}).to_string(),
    )
    .context("cannot write the layout's version")?;
    archive(&layout, &directory.join("busybox.tar"))
}

/// Stores a blob under its digest; its descriptor.
fn blob(blobs: &Path, kind: &str, content: &[u8]) -> Result<Value> {
    let digest = hexadecimal(&hmac_sha256::Hash::hash(content));
    fs::write(blobs.join(&digest), content).context("cannot write a blob")?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": content.len()}))
}

/// The content of `directory` as a tar archive: the same bytes whoever makes it, whenever.
fn archive(directory: &Path, target: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args([
        "--format=ustar",
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
    ])
    .arg("-cf")
    .arg(target)
    .arg("-C")
    .arg(directory)
    .arg(".");
    process::output(&mut tar)
        .map(drop)
        .context("cannot make an archive")
}
