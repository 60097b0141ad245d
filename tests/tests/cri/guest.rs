//! What containers do with the guest's kernel: interfaces and filters of their own, and the host's security modules.

use std::path::Path;

use bulkhead_tests::cri::api::{Capability, Device, ProfileType, SecurityProfile, SelinuxOption};
use bulkhead_tests::cri::mount;

use crate::pods;

fn network_admin(security: &mut bulkhead_tests::cri::api::LinuxContainerSecurityContext) {
    security.capabilities = Some(Capability {
        add_capabilities: vec!["NET_ADMIN".into()],
        ..Default::default()
    })
    .into();
}

#[test]
fn a_vpn_makes_its_interface_in_the_pod() {
    let test = pods("vpn");
    let pod = test
        .pod("pod")
        .linux(|linux| linux.security_context.mut_or_insert_default().privileged = true)
        .run();
    // As a device plugin gives it,
    let asked = pod
        .probe("asked", &["tick"])
        .security(network_admin)
        .with(|config| {
            config.devices.push(Device {
                host_path: "/dev/net/tun".into(),
                container_path: "/dev/net/tun".into(),
                permissions: "rwm".into(),
                ..Default::default()
            });
        })
        .start();
    let through = asked.exec(&["/probe", "tun", "through the device"]);
    assert_eq!(through.text(), "through the device\n");
    // and as a privileged pod mounts it.
    let mounted = pod
        .probe("mounted", &["tick"])
        .security(|security| security.privileged = true)
        .mount(mount(Path::new("/dev/net/tun"), "/dev/net/tun", false))
        .start();
    let through = mounted.exec(&["/probe", "tun", "through the mount"]);
    assert_eq!(through.text(), "through the mount\n");
    assert!(!Path::new("/sys/class/net/vpn0").exists());
}

#[test]
fn a_pod_filters_its_packets() {
    let test = pods("filters");
    let pod = test.pod("pod").run();
    // The host's programs: the image has none.
    let main = ["lib", "lib64", "sbin", "share"].into_iter().fold(
        pod.probe("main", &["tick"]).security(network_admin),
        |container, name| {
            let host = Path::new("/usr").join(name);
            let at = if name.starts_with("lib") { "/" } else { "/usr/" };
            if host.is_dir() {
                container.mount(mount(&host, &format!("{at}{name}"), true))
            } else {
                container
            }
        },
    );
    let main = main.start();
    for (program, address) in [("iptables", "127.0.0.1"), ("ip6tables", "::1")] {
        let ping = || main.sh(&format!("ping -c 1 -W 5 {address}"));
        assert_eq!(ping().code, 0, "{}", ping());
        let rule = format!("XTABLES_LIBDIR=/lib/x86_64-linux-gnu/xtables /usr/sbin/{program}");
        let add = main.sh(&format!(
            "{rule} -A OUTPUT -d {address} -j REJECT && {rule} -S OUTPUT"
        ));
        assert!(add.clone().text().contains("-j REJECT"), "{add}");
        assert_ne!(ping().code, 0);
    }
}

#[test]
fn labels_of_the_hosts_security_modules_do_not_matter() {
    let test = pods("labels");
    let pod = test.pod("pod").run();
    let with = |name: &str, profile: ProfileType, reference: &str| {
        let container = pod.container(name, &["sleep", "1000"]).security(|security| {
            security.apparmor = Some(SecurityProfile {
                profile_type: profile.into(),
                localhost_ref: reference.into(),
                ..Default::default()
            })
            .into();
            security.selinux_options = Some(SelinuxOption {
                user: "system_u".into(),
                role: "system_r".into(),
                type_: "container_t".into(),
                level: "s0:c1,c2".into(),
                ..Default::default()
            })
            .into();
        });
        container.try_start()
    };
    let unconfined = with("unconfined", ProfileType::UNCONFINED, "").unwrap();
    assert_eq!(
        unconfined
            .sh("cat /proc/self/attr/current 2>/dev/null || echo none")
            .text(),
        "none\n"
    );
    // On a host without AppArmor it is containerd that refuses profiles; with it, only one that is not loaded.
    let default = with("default", ProfileType::RUNTIME_DEFAULT, "");
    if Path::new("/sys/kernel/security/apparmor").is_dir() {
        assert!(default.unwrap().is_running());
    } else {
        assert!(
            default
                .unwrap_err()
                .to_string()
                .contains("apparmor is not supported")
        );
    }
    let absent = with("absent", ProfileType::LOCALHOST, "bulkhead-absent");
    let said = absent.map(drop).unwrap_err().to_string();
    assert!(said.contains("apparmor"), "{said}");
}
