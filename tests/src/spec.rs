//! OCI specifications made by hand, for what `ctr run` has no flag.

use std::path::Path;

use serde_json::{Value, json};

/// `ctr`'s default specification (`ctr oci spec`), changed step by step.
#[derive(Clone, Debug)]
pub struct Spec(pub Value);

impl Spec {
    /// Starts from `default`, with `root` as root file system and `command` as its process.
    #[must_use]
    pub fn new(default: Value, root: &Path, id: &str, command: &[&str]) -> Self {
        let mut spec = Spec(default);
        spec.0["root"]["path"] = json!(root);
        spec.0["process"]["args"] = json!(command);
        spec.0["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", crate::containerd::NAMESPACE));
        spec
    }

    /// Sets the value at a JSON pointer whose parent exists.
    ///
    /// # Panics
    /// If the parent does not exist.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').expect("a JSON pointer");
        let parent = self.0.pointer_mut(parent).expect("the parent exists");
        parent[key] = value;
        self
    }

    /// Adds a mount.
    ///
    /// # Panics
    /// If the specification has no list of mounts.
    #[must_use]
    pub fn mount(mut self, kind: &str, source: &str, destination: &str, options: &[&str]) -> Self {
        let mount = json!({ "type": kind, "source": source, "destination": destination, "options": options });
        self.0["mounts"].as_array_mut().expect("mounts").push(mount);
        self
    }
}
