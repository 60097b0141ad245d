//! Volumes as a kubelet hands them over.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use bulkhead_tests::cri::api::{Mount, MountPropagation};
use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::{Fixture, config};

use crate::pods;

fn mount(host: &Path, container: &str, readonly: bool) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        readonly,
        ..Default::default()
    }
}

/// Where the kubelet would have a pod's volume of this kind.
fn volume(test: &Fixture, kind: &str, name: &str) -> PathBuf {
    let path = test
        .work
        .join("pods/0b6c-11/volumes")
        .join(format!("kubernetes.io~{kind}"))
        .join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Swaps the content of a volume as the kubelet does.
fn write_version(directory: &Path, version: &str, value: &str) {
    let before = fs::read_link(directory.join("..data")).ok();
    fs::create_dir(directory.join(version)).unwrap();
    fs::write(directory.join(version).join("value"), value).unwrap();
    symlink(version, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    match before {
        Some(before) => fs::remove_dir_all(directory.join(before)).unwrap(),
        None => symlink("..data/value", directory.join("value")).unwrap(),
    }
}

#[test]
fn volumes_are_shared_updated_and_given_back() {
    let test = pods("volumes");
    let kinds = ["configmap", "secret", "projected", "downward-api"];
    let written = kinds.map(|kind| volume(&test, kind, "v"));
    for directory in &written {
        write_version(directory, "..1", "first");
    }
    let memory = volume(&test, "empty-dir", "memory");
    shell(&format!("mount -t tmpfs -o size=4m tmpfs {}", memory.display()));
    chown(&memory, Some(0), Some(2345)).unwrap();
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o2777)).unwrap();
    let disk = volume(&test, "empty-dir", "disk");
    let pages = volume(&test, "empty-dir", "pages");
    shell(&format!(
        "mount -t hugetlbfs -o pagesize=2M hugetlbfs {}",
        pages.display()
    ));

    let pod = test.pod("pod").run();
    let containers = ["a", "b"].map(|name| {
        let mut container = pod
            .probe(name, &["tick"])
            .mount(mount(&memory, "/memory", false))
            .mount(mount(&disk, "/disk", name == "a"))
            .mount(mount(&pages, "/pages", false));
        for (kind, directory) in kinds.iter().zip(&written) {
            container = container.mount(mount(directory, &format!("/{kind}"), true));
        }
        container.start()
    });
    let [a, b] = &containers;
    assert_eq!(b.sh("cat /*/value").text(), "first".repeat(4));
    for directory in &written {
        write_version(directory, "..2", "second");
    }
    for container in &containers {
        let seen = wait_until(config().seconds(1), || {
            container.sh("cat /*/value").text() == "second".repeat(4)
        });
        assert!(seen, "{:?}", container.sh("cat /*/value"));
    }
    assert_eq!(
        a.sh("echo x > /memory/x; stat -c '%a %g' /memory").text(),
        "2777 2345\n"
    );
    assert_eq!(b.sh("cat /memory/x; echo y > /disk/y").text(), "x\n");
    assert_eq!(
        a.sh("cat /disk/y; touch /disk/z 2>/dev/null || echo ro").text(),
        "y\nro\n"
    );
    assert_eq!(a.sh("/probe huge /pages/a 4").text(), "HugePages_Total: 4\n");
    assert_eq!(b.sh("ls /pages").text(), "a\n");
    assert_eq!(fs::read_dir(&memory).unwrap().count(), 0);
    drop(containers);
    drop(pod);
    shell(&format!("umount {} {}", memory.display(), pages.display()));
}

#[test]
fn bidirectional_propagation_is_refused() {
    let test = pods("propagation");
    let directory = test.work.join("host");
    fs::create_dir(&directory).unwrap();
    // containerd itself wants a shared mount for it.
    shell(&format!(
        "mount --bind {0} {0} && mount --make-shared {0}",
        directory.display()
    ));
    let pod = test.pod("pod").run();
    let refused = pod
        .container("a", &["sleep", "1000"])
        .mount(Mount {
            propagation: MountPropagation::PROPAGATION_BIDIRECTIONAL.into(),
            ..mount(&directory, "/host", false)
        })
        .try_start();
    let said = refused.map(drop).unwrap_err().to_string();
    assert!(said.contains("bidirectional"), "{said}");
    drop(pod);
    shell(&format!("umount {}", directory.display()));
}
