//! What a pod gives its containers where the specification leaves it to the runtime.

use std::path::Path;

use oci_spec::runtime::{Mount, Spec};

use super::GUEST_SHM;

/// Where the guest keeps the pod's files.
pub const GUEST_FILES: &str = "/run/bulkhead/etc";

/// Whether a mount's source is one of the pod's files in the guest.
pub(super) fn is_file(source: &Path) -> bool {
    source.parent() == Some(Path::new(GUEST_FILES)) && source.file_name().is_some()
}

/// Mounts the pod's `files` on `/etc/<name>` where nothing else is mounted, and makes shared memory the pod's:
/// with containerd's Sandbox API no file and no shared memory of the host stand for them.
pub fn add_mounts<'a>(spec: &mut Spec, files: impl IntoIterator<Item = &'a str>) {
    let read_only = spec
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let own_memory = mount.destination() == Path::new("/dev/shm")
            && mount.typ().as_deref() == Some("tmpfs")
            && mount.source().as_deref() == Some(Path::new("shm"));
        if own_memory {
            *mount = bind(GUEST_SHM.as_ref(), "/dev/shm".as_ref(), false);
        }
    }
    for name in files {
        let destination = Path::new("/etc").join(name);
        if !mounts.iter().any(|mount| *mount.destination() == destination) {
            mounts.push(bind(&Path::new(GUEST_FILES).join(name), &destination, read_only));
        }
    }
    spec.set_mounts(Some(mounts));
}

fn bind(source: &Path, destination: &Path, read_only: bool) -> Mount {
    let mut mount = Mount::default();
    let access = if read_only { "ro" } else { "rw" };
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(source.into()))
        .set_destination(destination.into())
        .set_options(Some(["rbind", "rprivate", access].map(String::from).into()));
    mount
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn mounts(spec: Value, files: &[&str]) -> Value {
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        add_mounts(&mut spec, files.iter().copied());
        serde_json::to_value(spec.mounts()).unwrap()
    }

    #[test]
    fn files_are_mounted_unless_something_is() {
        let hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": "/x", "options": []});
        let seen = mounts(
            json!({"ociVersion": "1.1.0", "root": {"path": "r", "readonly": true}, "mounts": [hosts]}),
            &["hosts", "resolv.conf"],
        );
        assert_eq!(seen.as_array().unwrap().len(), 2);
        assert_eq!(seen[0]["source"], "/x");
        assert_eq!(seen[1]["destination"], "/etc/resolv.conf");
        assert_eq!(seen[1]["source"], "/run/bulkhead/etc/resolv.conf");
        assert_eq!(seen[1]["options"], json!(["rbind", "rprivate", "ro"]));
        assert!(is_file(Path::new("/run/bulkhead/etc/resolv.conf")));
        for other in [
            "/run/bulkhead/etc/..",
            "/run/bulkhead/etc/a/b",
            "/run/bulkhead/etc",
            "/etc/hosts",
        ] {
            assert!(!is_file(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn shared_memory_is_the_pods() {
        let shm =
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]});
        let own = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": []});
        let seen = mounts(json!({"ociVersion": "1.1.0", "mounts": [shm]}), &[]);
        assert_eq!(
            (&seen[0]["type"], &seen[0]["source"]),
            (&json!("bind"), &json!(GUEST_SHM))
        );
        let seen = mounts(json!({"ociVersion": "1.1.0", "mounts": [own.clone()]}), &[]);
        assert_eq!(seen, json!([own]));
    }
}
