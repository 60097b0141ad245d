//! Which sandbox a task belongs to, and where that sandbox's server listens.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use hmac_sha256::Hash;

/// Where sockets are unless containerd says otherwise.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// Longest path of a Unix socket.
const SOCKET_PATH_LIMIT: usize = 106;

/// A task's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// A container that is a sandbox of its own.
    Single,
    /// The container that stands for a pod's sandbox.
    Sandbox,
    /// A container in the sandbox of this id.
    Container(String),
}

/// Annotations of a container's type and its sandbox's id: containerd's CRI plugin, then CRI-O.
const ANNOTATIONS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// Why a task has no place.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GroupError {
    /// The type is not known.
    #[error("Annotation {name} = {value} is not valid: sandbox or container is")]
    Type {
        /// Annotation.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// A container names no sandbox.
    #[error("Annotation {0} is missing")]
    NoSandbox(&'static str),
    /// The socket's path would be too long.
    #[error("Socket path {} is longer than {SOCKET_PATH_LIMIT} bytes", .0.display())]
    TooLong(PathBuf),
}

impl Group {
    /// Reads the annotations of a task.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self, GroupError> {
        for (type_name, sandbox_name) in ANNOTATIONS {
            match annotations.get(type_name).map(String::as_str) {
                None => {}
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let sandbox = annotations.get(sandbox_name).filter(|id| !id.is_empty());
                    return sandbox
                        .cloned()
                        .map(Self::Container)
                        .ok_or(GroupError::NoSandbox(sandbox_name));
                }
                Some(value) => {
                    return Err(GroupError::Type {
                        name: type_name,
                        value: value.to_owned(),
                    });
                }
            }
        }
        Ok(Self::Single)
    }

    /// Id of the sandbox that task `id` belongs to.
    #[must_use]
    pub fn sandbox_id<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Self::Single | Self::Sandbox => id,
            Self::Container(sandbox) => sandbox,
        }
    }
}

/// Where a sandbox's server and state are. Reproducible: every `start` in a pod computes the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Path of the server's socket.
    pub socket: PathBuf,
    /// Name of the state directory: the id, and a part of the hash for ids that are not unique between
    /// namespaces or containerd instances.
    pub state_name: String,
}

impl Place {
    /// The place of sandbox `id` of `namespace` in the containerd at `address`.
    ///
    /// # Errors
    /// [`GroupError::TooLong`].
    pub fn new(
        socket_dir: Option<&Path>,
        address: &str,
        namespace: &str,
        id: &str,
    ) -> Result<Self, GroupError> {
        let hash = hex(&Hash::hash(&join(&[address, namespace, id])));
        let socket = socket_dir.unwrap_or(Path::new(SOCKET_DIR)).join(&hash);
        if socket.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err(GroupError::TooLong(socket));
        }
        Ok(Self {
            socket,
            state_name: format!("{id}.{}", &hash[..8]),
        })
    }

    /// The server's address as containerd wants it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Go's filepath.Join: elements joined by slashes, empty ones left out, the result cleaned.
fn join(parts: &[&str]) -> Vec<u8> {
    let joined: Vec<&str> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
    let mut clean = PathBuf::new();
    for component in Path::new(&joined.join("/")).components() {
        match component {
            Component::ParentDir if matches!(clean.components().next_back(), Some(Component::Normal(_))) => {
                clean.pop();
            }
            Component::ParentDir if clean == Path::new("/") => {}
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean.to_string_lossy().into_owned().into_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Group, GroupError> {
        Group::of(&pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect())
    }

    #[test]
    fn annotations_decide() {
        assert_eq!(of(&[]).unwrap(), Group::Single);
        assert_eq!(
            of(&[("io.kubernetes.cri.container-type", "sandbox")]).unwrap(),
            Group::Sandbox
        );
        let container = [
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-id", "s"),
        ];
        assert_eq!(of(&container).unwrap().sandbox_id("c"), "s");
        let crio = [
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "s"),
        ];
        assert_eq!(of(&crio).unwrap(), Group::Container("s".into()));
        assert!(matches!(
            of(&[("io.kubernetes.cri.container-type", "x")]),
            Err(GroupError::Type { .. })
        ));
        assert!(matches!(
            of(&[("io.kubernetes.cri.container-type", "container")]),
            Err(GroupError::NoSandbox(_))
        ));
    }

    #[test]
    fn the_address_is_the_hash_of_the_joined_path() {
        // printf %s /run/containerd/containerd.sock/default/test | sha256sum
        let place = Place::new(None, "/run/containerd/containerd.sock", "default", "test").unwrap();
        assert_eq!(
            join(&["/run/containerd/containerd.sock", "default", "test"]),
            b"/run/containerd/containerd.sock/default/test"
        );
        assert_eq!(
            place.address(),
            "unix:///run/containerd/s/cfa94b04d543b3f64f78eff8125c7a7cd0903173f673d87367be72ff09fc92c2"
        );
        let other = Place::new(
            Some(Path::new("/run/x")),
            "/run/containerd/containerd.sock",
            "default",
            "test",
        )
        .unwrap();
        assert_eq!(other.socket.parent().unwrap(), Path::new("/run/x"));
        assert_eq!(other.socket.file_name(), place.socket.file_name());
        assert!(place.state_name.starts_with("test."));
    }

    #[test]
    fn joining_cleans() {
        assert_eq!(join(&["", "n", "i"]), b"n/i");
        assert_eq!(join(&["/a//b/./c/../d", "n"]), b"/a/b/d/n");
        assert_eq!(join(&["/..", "a"]), b"/a");
    }

    #[test]
    fn a_long_socket_directory_is_refused() {
        let long = format!("/{}", "x".repeat(60));
        assert!(matches!(
            Place::new(Some(Path::new(&long)), "a", "n", "i"),
            Err(GroupError::TooLong(_))
        ));
    }

    proptest! {
        #[test]
        fn different_ids_have_different_places(a in "[a-z0-9]{1,20}", b in "[a-z0-9]{1,20}") {
            let place = |id: &str| Place::new(None, "/c.sock", "ns", id).unwrap();
            prop_assert_eq!(place(&a) == place(&b), a == b);
        }
    }
}
