//! Files of a container and of its host, one and the same.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::{config, pattern};

use crate::fixture;

const MIB: u64 = 1 << 20;

#[test]
fn files_of_every_kind_reach_the_snapshot() {
    let test = fixture("files");
    let run = test.probe("a", &["files", "/data"]).keep();
    assert_eq!(run.finish().text(), "all done\n");
    test.with_snapshot("overlayfs", &run.id, |root| {
        let data = root.join("data");
        let metadata = |name: &str| fs::symlink_metadata(data.join(name)).unwrap();
        let owner = |name: &str| {
            (
                metadata(name).uid(),
                metadata(name).gid(),
                metadata(name).mode() & 0o7777,
            )
        };
        assert_eq!(fs::read_to_string(data.join("plain")).unwrap(), "plain\n");
        assert_eq!(owner("plain"), (1234, 2345, 0o640));
        assert_eq!(owner("setuid"), (1234, 0, 0o4755));
        assert_eq!(owner("sticky"), (0, 0, 0o1777));
        assert_eq!(owner("unreadable"), (0, 0, 0));
        assert_eq!(owner("sticky/mine"), (1234, 2345, 0o644));
        assert_eq!(
            (metadata("link-a").ino(), metadata("link-a").nlink()),
            (metadata("link-b").ino(), 2)
        );
        assert_eq!(fs::read_link(data.join("relative")).unwrap(), Path::new("link-a"));
        assert_eq!(
            fs::read_link(data.join("dangling")).unwrap(),
            Path::new("/no/such/file")
        );
        assert_eq!(attribute(&data.join("attributes"), c"user.small"), b"value");
        assert_eq!(attribute(&data.join("attributes"), c"user.large").len(), 2000);
        assert!(metadata("fifo").file_type().is_fifo());
        assert!(metadata("socket").file_type().is_socket());
        assert_eq!(
            (metadata("times").mtime(), metadata("times").mtime_nsec()),
            (1_000_000_000, 123_456_789)
        );
        assert_eq!(metadata("sparse").len(), 8192);
        assert_eq!(
            fs::read(data.join(["d"; 40].join("/")).join("bottom")).unwrap(),
            b"deep"
        );
        assert_eq!(fs::read(data.join("rename-to")).unwrap(), b"new");
        assert!(!data.join("rename-from").exists() && !data.join("unlinked").exists());
        assert_eq!(fs::read(data.join("mapped")).unwrap()[5000], b'!');
    });
    test.remove(&run.id);
}

#[test]
fn a_hundred_mebibytes_survive_the_round_trip() {
    let test = fixture("hundred-mebibytes");
    let size = u64::from(config().crowd(100)) * MIB;
    pattern::write(1, size, &mut File::create(test.work.join("in")).unwrap()).unwrap();
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:rw",
        test.work.display()
    );
    let script = "set -e; /probe check /shared/in; cp /shared/in /copy; sync; cp /copy /shared/out; /probe check /copy";
    let run = test
        .run("a", PROBE_IMAGE, &["sh", "-c", script])
        .with(&["--mount", &mount]);
    let length = format!("{} bytes\n", size);
    assert_eq!(run.start_for(120).finish().text(), length.repeat(2));
    let mut copy = BufReader::new(File::open(test.work.join("out")).unwrap());
    assert_eq!(pattern::check(1, &mut copy).unwrap(), size);
}

#[test]
fn a_directory_of_ten_thousand_entries_works() {
    let test = fixture("ten-thousand");
    let many = test.work.join("many");
    fs::create_dir(&many).unwrap();
    for number in 0..10_000 {
        File::create(many.join(format!("entry-{number:06}"))).unwrap();
    }
    let mount = format!("type=bind,src={},dst=/many,options=rbind:rw", many.display());
    // Fewer are made in the guest: each takes several requests of about 5 ms in an emulated host.
    let made = config().crowd(2000);
    let script = format!(
        "set -e; ls /many | sort -u | wc -l; rm /many/entry-0012*; ls /many | wc -l; /probe entries /made {made}"
    );
    let run = test
        .run("a", PROBE_IMAGE, &["sh", "-c", &script])
        .with(&["--mount", &mount]);
    let text = run.start_for(60).finish().text();
    assert_eq!(text, format!("10000\n9900\n{made} entries, {} left\n", made / 2));
    assert_eq!(fs::read_dir(&many).unwrap().count(), 9900);
    assert!(many.join("entry-001199").exists() && !many.join("entry-001200").exists());
}

#[test]
fn what_the_host_changes_is_seen_in_the_container() {
    let test = fixture("live");
    let shared = test.work.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("old"), "before").unwrap();
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", shared.display());
    let script = "cat /shared/old; echo; while read name; do cat /shared/$name && echo; echo $name > /shared/last; done";
    let mut session = test
        .busybox("a", &["sh", "-c", script])
        .with(&["--mount", &mount])
        .start();
    session.wait_for("before\n");
    fs::write(shared.join("new"), "made later").unwrap();
    session.send("new\n");
    session.wait_for("made later\n");
    // Kubernetes swaps a symlink to bring a new version of a ConfigMap.
    for version in ["one", "two"] {
        fs::create_dir(shared.join(version)).unwrap();
        fs::write(shared.join(version).join("value"), format!("version {version}")).unwrap();
        std::os::unix::fs::symlink(version, shared.join("..data_tmp")).unwrap();
        fs::rename(shared.join("..data_tmp"), shared.join("..data")).unwrap();
        // The guest may answer from its cache for about a second.
        let seen = wait_until(config().seconds(5), || {
            session.send("..data/value\n");
            std::thread::sleep(Duration::from_millis(200));
            session.stdout().contains(&format!("version {version}\n"))
        });
        assert!(seen, "{session}");
    }
    session.close_input();
    let _ = session.finish().expect_code(0);
    assert_eq!(fs::read_to_string(shared.join("last")).unwrap(), "..data/value\n");
}

fn attribute(path: &Path, name: &std::ffi::CStr) -> Vec<u8> {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let mut value = vec![0_u8; 4096];
    // SAFETY: the strings are NUL-terminated and the buffer is valid for its length.
    let size = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(size).unwrap());
    value
}
