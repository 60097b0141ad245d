//! containerd's configuration, and what CRI needs beside it: the pods' network.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::config;
use crate::image::PAUSE_IMAGE;
use crate::session::Session;

/// The bridge that the pods are on. It is made before the first one, so that it is not what a test leaves behind.
pub const BRIDGE: &str = "bulkhead-pods";
/// The pods' IPv4 network; the bridge has the first address.
pub const NETWORK: &str = "10.251.0.0/16";
/// Socket of containerd for plugins of NRI, in its directory, once [`enable_nri`] has been called.
pub const NRI_SOCKET: &str = "nri.sock";
/// Configuration of the handler `kata-sized`, and its most vCPUs.
const SIZED: &str = "sized.json";
/// See [`cri`].
pub const MAX_VCPUS: u32 = 4;
/// Snapshotters that have a handler of their own, see [`cri`].
pub const SNAPSHOTTERS: [&str; 4] = ["overlayfs", "native", "blockfile", "erofs"];
/// The host in the pods' network.
pub const GATEWAY: &str = "10.251.0.1";
/// The pods' IPv6 network.
pub const NETWORK_6: &str = "fd00:251::/64";
/// The host in the pods' IPv6 network.
pub const GATEWAY_6: &str = "fd00:251::1";
/// Largest payload of a frame in bytes: one that nothing has by itself.
pub const MTU: u32 = 1430;

/// For the suite that uses `ctr`: no CRI.
pub fn tasks(directory: &Path, version: &str) -> String {
    let mut text = format!(
        "version = 2\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \
         \"io.containerd.cri.v1.runtime\", \"io.containerd.nri.v1.nri\"]\n{}",
        common(directory)
    );
    if !is_1(version) {
        text += "[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"erofs\", \"walking\"]\n";
    }
    text
}

/// For the suite that drives CRI: the handlers `runc`, `kata`, `kata-sized`, whose VMs have room for
/// [`MAX_VCPUS`] vCPUs however few processors the host has, and, with containerd 2, `kata-shim`. `kata` and `kata-shim`
/// are there once more for each snapshotter, as `kata-native`, `kata-shim-native`…
pub fn cri(directory: &Path, version: &str) -> String {
    let common = common(directory);
    let (cni, conf) = (config().cni.display(), directory.join("cni"));
    let conf = conf.display();
    if is_1(version) {
        let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
        let handlers = handlers(plugin, directory, false);
        return format!(
            "version = 2\n{common}\
             [{plugin}]\n  sandbox_image = \"{PAUSE_IMAGE}\"\n  enable_unprivileged_ports = true\n\
             \x20 disable_hugetlb_controller = false\n\
             [{plugin}.cni]\n  bin_dir = \"{cni}\"\n  conf_dir = \"{conf}\"\n\
             {handlers}"
        );
    }
    let plugin = "plugins.\"io.containerd.cri.v1.runtime\"";
    let handlers = handlers(plugin, directory, true);
    format!(
        "version = 3\n{common}\
         [plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"erofs\", \"walking\"]\n\
         [plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{PAUSE_IMAGE}\"\n\
         [{plugin}]\n  disable_hugetlb_controller = false\n\
         [{plugin}.cni]\n  bin_dirs = [\"{cni}\"]\n  conf_dir = \"{conf}\"\n\
         {handlers}"
    )
}

/// Changes containerd's configuration so that plugins of the Node Resource Interface can connect after its next start;
/// the configuration as it was.
///
/// # Panics
/// If there is no configuration.
pub fn enable_nri(directory: &Path) -> String {
    let file = directory.join("config.toml");
    let before = fs::read_to_string(&file).expect("a configuration");
    let limit = config().seconds(5).as_secs();
    let directory = directory.display();
    let section = "[plugins.\"io.containerd.nri.v1.nri\"]\n";
    let enabled = format!(
        "{section}  disable = false\n  disable_connections = false\n  \
         socket_path = \"{directory}/{NRI_SOCKET}\"\n  plugin_path = \"{directory}/nri\"\n  \
         plugin_config_path = \"{directory}/nri\"\n  plugin_registration_timeout = \"{limit}s\"\n  \
         plugin_request_timeout = \"{limit}s\"\n"
    );
    let after = before.replace(&format!("{section}  disable = true\n"), &enabled);
    assert_ne!(before, after, "NRI is not disabled");
    fs::write(file, after).expect("a file");
    before
}

fn is_1(version: &str) -> bool {
    version.starts_with("1.")
}

fn common(directory: &Path) -> String {
    let directory = directory.display();
    let level = &config().log_level;
    format!(
        r#"root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[debug]
  level = "{level}"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{directory}/blockfile"
  scratch_file = "{directory}/scratch.ext4"
  fs_type = "ext4"
  mount_options = ["loop"]
"#
    )
}

fn handlers(plugin: &str, directory: &Path, sandboxers: bool) -> String {
    let runtimes = format!("{plugin}.containerd.runtimes");
    let kata = |name: &str, more: &str| {
        format!(
            "[{runtimes}.{name}]\n  runtime_type = \"io.containerd.kata.v2\"\n  \
             privileged_without_host_devices = true\n  \
             privileged_without_host_devices_all_devices_allowed = true\n  \
             pod_annotations = [\"io.katacontainers.*\", \"dev.bulkhead.*\"]\n  \
             container_annotations = [\"io.katacontainers.*\"]\n{more}"
        )
    };
    let mut text = format!(
        "[{plugin}.containerd]\n  default_runtime_name = \"runc\"\n\
         [{runtimes}.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n{}",
        kata("kata", "")
    );
    let options = format!(
        "[{runtimes}.kata-sized.options]\n  ConfigPath = \"{}\"\n",
        directory.join(SIZED).display()
    );
    text += &kata("kata-sized", &options);
    let shim = "  sandboxer = \"shim\"\n";
    if sandboxers {
        text += &kata("kata-shim", shim);
    }
    for snapshotter in SNAPSHOTTERS {
        let own = format!("  snapshotter = \"{snapshotter}\"\n");
        text += &kata(&format!("kata-{snapshotter}"), &own);
        if sandboxers {
            text += &kata(&format!("kata-shim-{snapshotter}"), &format!("{shim}{own}"));
        }
    }
    text
}

/// Writes the network's configuration, makes the bridge, and makes directories that stay once they are there.
///
/// # Panics
/// If the bridge cannot be made.
pub fn prepare_cri(directory: &Path) {
    let cni = directory.join("cni");
    for made in ["root", "state"] {
        for kept in [
            "io.containerd.grpc.v1.cri/sandboxes",
            "io.containerd.grpc.v1.cri/containers",
            // Of the sandboxes that shims make.
            "io.containerd.sandbox.controller.v1.shim/k8s.io",
        ] {
            fs::create_dir_all(directory.join(made).join(kept)).expect("a directory");
        }
    }
    let volumes = directory.join("state/io.containerd.grpc.v1.cri/image-volumes");
    for path in [
        &cni,
        &volumes,
        &directory.join("logs"),
        Path::new("/var/lib/cni/results"),
        Path::new("/run/netns"),
        // Of runc, as containerd's shim starts it.
        Path::new("/run/containerd/runc/k8s.io"),
    ] {
        fs::create_dir_all(path).expect("a directory");
    }
    let current = fs::read("/etc/bulkhead/config.json").unwrap_or_else(|_| b"{}".to_vec());
    let mut sized: serde_json::Value = serde_json::from_slice(&current).expect("a configuration");
    sized["max_vcpus"] = MAX_VCPUS.into();
    fs::write(directory.join(SIZED), sized.to_string()).expect("a file");
    let network = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipMasq": false,
                "hairpinMode": true,
                "mtu": MTU,
                "ipam": {
                    "type": "host-local",
                    "dataDir": directory.join("ipam"),
                    "ranges": [[{"subnet": NETWORK}], [{"subnet": NETWORK_6}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::write(cni.join("10-pods.conflist"), network.to_string()).expect("a file");
    remove_bridge();
    ip(&["link", "add", BRIDGE, "type", "bridge"]);
    ip(&["address", "add", &format!("{GATEWAY}/16"), "dev", BRIDGE]);
    ip(&[
        "address",
        "add",
        &format!("{GATEWAY_6}/64"),
        "dev",
        BRIDGE,
        "nodad",
    ]);
    ip(&["link", "set", BRIDGE, "up"]);
}

/// Takes the bridge away, if it is there.
pub fn remove_bridge() {
    if Path::new("/sys/class/net").join(BRIDGE).exists() {
        ip(&["link", "delete", BRIDGE]);
    }
}

fn ip(arguments: &[&str]) {
    let mut command = Command::new("ip");
    command.args(arguments);
    let _ = Session::start(command, config().seconds(10))
        .finish()
        .expect_code(0);
}
