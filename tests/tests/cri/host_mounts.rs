//! Mounts whose source is more than a directory: mounts made later, devices, images, and what the kubelet measures.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bulkhead_tests::config;
use bulkhead_tests::cri::api::{Mount, MountPropagation};
use bulkhead_tests::cri::{self, mount};
use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::image::{CONFIGURED_IMAGE, MARKER};

use crate::pods;

fn following(host: &Path, container: &str, readonly: bool) -> Mount {
    Mount {
        propagation: MountPropagation::PROPAGATION_HOST_TO_CONTAINER.into(),
        ..mount(host, container, readonly)
    }
}

#[test]
fn mounts_that_the_host_makes_later_appear() {
    let test = pods("later");
    let volume = test.work.join("volume");
    fs::create_dir_all(volume.join("late")).unwrap();
    fs::write(volume.join("late/below"), "below\n").unwrap();
    let pod = test.pod("pod").run();
    let with = |name: &str, mount: Mount| {
        let container = pod.container(name, &["sleep", "1000"]).mount(mount);
        container.start()
    };
    let writer = with("writer", following(&volume, "/data", false));
    let reader = with("reader", following(&volume, "/data", true));
    let closed = with("closed", mount(&volume, "/data", false));
    for container in [&writer, &reader, &closed] {
        assert_eq!(container.sh("cat /data/late/*").text(), "below\n");
    }

    let late = volume.join("late");
    shell(&format!("mount -t tmpfs tmpfs {}", late.display()));
    fs::write(late.join("late"), "late\n").unwrap();
    for container in [&writer, &reader] {
        let seen = wait_until(config().seconds(2), || {
            container.sh("cat /data/late/*").stdout == "late\n"
        });
        assert!(seen, "{}", container.sh("cat /data/late/*; cat /proc/mounts"));
    }
    assert_eq!(writer.sh("echo new > /data/late/new").code, 0);
    assert_eq!(fs::read_to_string(late.join("new")).unwrap(), "new\n");
    assert_ne!(reader.sh("echo new > /data/late/other").code, 0);
    // Without propagation it stays what it was.
    assert_eq!(closed.sh("cat /data/late/*").text(), "below\n");

    shell(&format!("umount -l {}", late.display()));
    for container in [&writer, &reader] {
        let gone = wait_until(config().seconds(2), || {
            container.sh("cat /data/late/*").stdout == "below\n"
        });
        assert!(gone, "{}", container.sh("cat /data/late/*; cat /proc/mounts"));
    }
}

#[test]
fn a_path_below_dev_is_the_guests_device() {
    let test = pods("devices");
    let pod = test
        .pod("pod")
        .linux(|linux| linux.security_context.mut_or_insert_default().privileged = true)
        .run();
    let main = pod
        .probe("main", &["tick"])
        .mount(mount(Path::new("/dev/zero"), "/zero", false))
        .mount(mount(Path::new("/dev/kmsg"), "/kmsg", true))
        .mount(mount(Path::new("/dev"), "/guest-dev", true))
        .security(|security| security.privileged = true)
        .start();
    assert_eq!(
        main.sh("head -c 4 /zero | od -An -tx1").text().trim(),
        "00 00 00 00"
    );
    // The guest's kernel speaks here, and its devices are there, not the host's.
    assert!(main.sh("head -n 5 /kmsg").text().contains("Linux version"));
    let listed = main.sh("ls /guest-dev").text();
    let names: Vec<&str> = listed.lines().collect();
    assert!(names.contains(&"pmem0") && !names.contains(&"kvm"), "{names:?}");
    let refused = pod
        .probe("refused", &["tick"])
        .mount(mount(Path::new("/dev/kvm"), "/kvm", false))
        .try_start();
    let said = refused.map(drop).unwrap_err().to_string();
    assert!(said.contains("/dev/kvm"), "{said}");
    let plain = pod
        .probe("plain", &["tick"])
        .mount(mount(Path::new("/dev/kmsg"), "/kmsg", true))
        .start();
    let read = plain.exec(&["/probe", "errno", "read", "/kmsg"]).text();
    assert_eq!(read, "EPERM\n");
}

#[test]
fn an_image_is_a_volume() {
    let test = pods("image-volume");
    if test.containerd.version.starts_with("1.") {
        println!("containerd {} has no image volumes", test.containerd.version);
        return;
    }
    let pod = test.pod("pod").run();
    let mount = || Mount {
        image: Some(cri::image(CONFIGURED_IMAGE)).into(),
        container_path: "/image".into(),
        readonly: true,
        ..Default::default()
    };
    let containers = ["a", "b"].map(|name| {
        let container = pod.container(name, &["sleep", "1000"]).mount(mount());
        container.start()
    });
    for container in &containers {
        assert_eq!(container.sh(&format!("cat /image{}", MARKER.0)).text(), MARKER.1);
        assert_eq!(
            container.sh("/image/probe errno write /image/new").text(),
            "EROFS\n"
        );
    }
}

/// The kubelet measures disk volumes on the host and evicts a pod that is over its limit.
#[test]
fn what_an_ephemeral_volume_takes_is_seen_on_the_host() {
    let test = pods("ephemeral");
    let volume = test
        .work
        .join("pods/0b6c-22/volumes/kubernetes.io~empty-dir/disk");
    fs::create_dir_all(&volume).unwrap();
    let used = || {
        let files = fs::read_dir(&volume).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().blocks() * 512)
            .sum::<u64>()
    };
    let pod = test.pod("pod").run();
    let main = pod
        .container("main", &["sleep", "1000"])
        .mount(mount(&volume, "/cache", false))
        .start();
    let write = main.sh("dd if=/dev/zero of=/cache/a bs=1M count=8 2>/dev/null");
    assert_eq!(write.code, 0, "{write}");
    assert!((8 << 20..9 << 20).contains(&used()), "{}", used());
    assert_eq!(main.sh("rm /cache/a").code, 0);
    assert_eq!(used(), 0);
}
