//! Checks that several targets of the pod's side share.

use bulkhead_agent::cgroup::resources::settings;
use oci_spec::runtime::LinuxResources;

/// Limits become files of the container's own group.
pub fn check_settings(resources: &LinuxResources) {
    for setting in settings(resources).into_iter().flatten() {
        let file = &setting.file;
        assert!(!file.is_empty() && !file.contains(['/', '\0']), "{file:?}");
        assert!(!matches!(file.as_str(), "." | ".."));
    }
}
