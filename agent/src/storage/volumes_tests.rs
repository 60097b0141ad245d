#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("host")).unwrap();
        fs::create_dir_all(path.join("guest")).unwrap();
        Self(path)
    }

    fn write(&self, version: &str, files: &[(&str, &str)]) {
        let directory = self.0.join("host").join(version);
        for (name, content) in files {
            let file = directory.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, content).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(0o440)).unwrap();
        }
    }

    fn version(&self, name: &str) -> Version {
        Version {
            volume: self.0.join("guest"),
            name: name.into(),
        }
    }

    fn stage(&self, name: &str) -> Result<(), VolumeError> {
        self.version(name).stage(&self.0.join("host"))
    }

    fn shown(&self) -> Vec<String> {
        let mut names: Vec<String> = names(&self.0.join("guest"))
            .unwrap()
            .into_iter()
            .map(|name| name.into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join("guest").join(name)).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn nothing_is_shown_before_the_commit() {
    let scratch = Scratch::new("volume-swap");
    scratch.write("..1", &[("a", "one"), ("b/c", "one"), ("gone", "one")]);
    scratch.stage("..1").unwrap();
    assert_eq!(scratch.shown(), ["..1"]);
    scratch.version("..1").commit().unwrap();
    assert_eq!(scratch.shown(), ["..1", "..data", "a", "b", "gone"]);
    assert_eq!(scratch.read("b/c"), "one");
    let mode = fs::metadata(scratch.0.join("guest/a")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o440);

    scratch.write("..2", &[("a", "two"), ("b/d", "two"), ("new", "two")]);
    scratch.stage("..2").unwrap();
    assert_eq!(scratch.read("a"), "one");
    scratch.version("..2").commit().unwrap();
    assert_eq!(scratch.shown(), ["..2", "..data", "a", "b", "new"]);
    assert_eq!(
        (scratch.read("a"), scratch.read("b/d")),
        ("two".into(), "two".into())
    );
}

#[test]
fn an_abandoned_version_leaves_nothing() {
    let scratch = Scratch::new("volume-abandoned");
    scratch.write("..1", &[("a", "one")]);
    scratch.write("..2", &[("a", "two")]);
    scratch.stage("..1").unwrap();
    // Half a copy is replaced by a whole one.
    fs::write(scratch.0.join("guest/..1/extra"), "x").unwrap();
    scratch.stage("..1").unwrap();
    assert!(!scratch.0.join("guest/..1/extra").exists());
    scratch.stage("..2").unwrap();
    scratch.version("..2").commit().unwrap();
    assert_eq!(scratch.shown(), ["..2", "..data", "a"]);
    assert!(scratch.stage("..3").is_err());
    assert!(scratch.version("..3").commit().is_err());
    assert_eq!(scratch.read("a"), "two");
}

#[test]
fn a_directory_of_a_volume_is_no_way_out() {
    let scratch = Scratch::new("volume-links");
    symlink("/", scratch.0.join("guest/link")).unwrap();
    for path in ["link", "link/etc"] {
        let create = Create {
            point: scratch.0.join("point"),
            mode: 0o755,
            uid: 0,
            gid: 0,
            kind: CreateKind::Directory {
                volume: scratch.0.join("guest"),
                path: path.into(),
            },
        };
        let error = create.run().unwrap_err();
        let VolumeError::File(FileError { source, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!(source.raw_os_error(), Some(libc::ELOOP), "{path}");
    }
}

#[test]
fn requests_are_checked() {
    for name in ["", "a", "..", "1/2", "-1", "123456789012345678901"] {
        assert!(point(name).is_err(), "{name}");
    }
    let directory = |path: &str| {
        Create::new(&proto::CreateVolumeRequest {
            name: "2".into(),
            kind: Some(Kind::Directory(proto::SubVolume {
                volume: "1".into(),
                path: path.into(),
                ..Default::default()
            })),
            ..Default::default()
        })
    };
    assert!(directory("a/b").is_ok());
    for path in ["", "/a", "..", "a/../b", "a\0"] {
        assert!(directory(path).is_err(), "{path}");
    }
}

#[test]
#[ignore = "needs root"]
fn volumes_in_memory_have_owner_size_and_directories() {
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    nix::mount::mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    let scratch = Scratch::new("volume-memory");
    let create = |name: &str, kind| Create {
        point: scratch.0.join(name),
        mode: 0o2770,
        uid: 0,
        gid: 2345,
        kind,
    };
    create("1", CreateKind::Memory(1 << 20)).run().unwrap();
    let volume = scratch.0.join("1");
    let metadata = fs::metadata(&volume).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o2770, 2345));
    let full = fs::write(volume.join("large"), vec![0; 2 << 20]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    fs::remove_file(volume.join("large")).unwrap();

    let directory = |path: &str| CreateKind::Directory {
        volume: volume.clone(),
        path: path.into(),
    };
    create("2", directory("a/b")).run().unwrap();
    fs::write(scratch.0.join("2/file"), "x").unwrap();
    assert_eq!(fs::read(volume.join("a/b/file")).unwrap(), b"x");
    create("3", directory("a/b/file")).run().unwrap();
    assert_eq!(fs::read(scratch.0.join("3")).unwrap(), b"x");
    symlink("/", volume.join("link")).unwrap();
    assert!(create("4", directory("link/etc")).run().is_err());
    for name in ["3", "2", "1"] {
        mount::unmount(&scratch.0.join(name)).unwrap();
    }
}

proptest! {
    #[test]
    fn a_version_is_one_name(name in "[./a\\x00]{0,6}") {
        if let Ok(version) = Version::new("1", &name) {
            let path = version.volume.join(&version.name);
            prop_assert_eq!(path.parent(), Some(version.volume.as_path()));
            prop_assert!(name.starts_with(".."));
        }
    }
}
