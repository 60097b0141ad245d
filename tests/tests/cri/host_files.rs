//! Files and directories of the host in several containers of a pod.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use bulkhead_tests::cri::mount;

use crate::pods;

#[test]
fn a_volume_is_shared_by_the_containers_of_a_pod() {
    let test = pods("host-files");
    let volume = test.work.join("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();
    let link = test.work.join("link");
    symlink(&volume, &link).unwrap();
    fs::write(volume.join("from-host"), "host\n").unwrap();

    let pod = test.pod("pod").run();
    let init = pod
        .container("init", &["sh", "-c", "cat /data/from-host > /data/copy"])
        .mount(mount(&volume, "/data", false))
        .finish();
    assert_eq!(init.code, 0, "{init}");
    let reader = pod
        .container("reader", &["sleep", "1000"])
        .mount(mount(&link, "/data", true))
        .start();
    assert_eq!(reader.sh("cat /data/copy").text(), "host\n");
    assert_ne!(reader.sh("echo x > /data/new").code, 0);
    let writer = pod
        .container("writer", &["sleep", "1000"])
        .mount(mount(&volume, "/data", false))
        .start();
    assert_eq!(writer.sh("echo new > /data/new").code, 0);
    assert_eq!(reader.sh("cat /data/new").text(), "new\n");
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "new\n");
}

#[test]
fn a_container_writes_its_termination_message() {
    let test = pods("termination");
    let file = test.work.join("termination-log");
    fs::write(&file, "").unwrap();
    let pod = test.pod("pod").run();
    let main = pod
        .container(
            "main",
            &["sh", "-c", "echo the reason > /dev/termination-log; exit 4"],
        )
        .mount(mount(&file, "/dev/termination-log", false))
        .finish();
    assert_eq!(main.code, 4, "{main}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "the reason\n");
}
