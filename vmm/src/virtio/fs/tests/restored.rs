//! A device that goes on from a snapshot of another one.

use super::*;

/// A tree with a file below a directory, and one beside it.
fn tree() -> TempDir {
    let tree = TempDir::new().unwrap();
    let root = tree.as_path();
    std::fs::create_dir(root.join("below")).unwrap();
    std::fs::write(root.join("below/kept"), "0123456789").unwrap();
    std::fs::write(root.join("beside"), "abc").unwrap();
    tree
}

/// A guest that has mounted such a tree.
fn mounted() -> Guest {
    let tree = tree();
    let root = tree.as_path().to_owned();
    let mut guest = guest_of(tree, &root);
    guest.init();
    guest
}

/// Node of the file below the directory.
fn find_kept(guest: &mut Guest) -> u64 {
    let below = guest.node(ROOT, "below");
    guest.node(below, "kept")
}

fn go_on(tree: TempDir, state: &DeviceState) -> Guest {
    let root = tree.as_path().to_owned();
    guest_with(tree, &root, Some(state))
}

fn paused(guest: &mut Guest) -> DeviceState {
    guest.fs.pause().unwrap();
    guest.fs.save_state()
}

#[test]
fn files_that_the_guest_knows_are_those_of_the_same_name() {
    let mut guest = mounted();
    let below = guest.node(ROOT, "below");
    let kept = guest.node(below, "kept");
    let handle = guest.open(kept);
    assert_eq!(guest.read(kept, handle, 2, 3).1, b"234");
    let state = paused(&mut guest);
    // The first one goes on as well.
    guest.fs.resume();
    assert_eq!(guest.read(kept, handle, 5, 3).1, b"567");

    let other = tree();
    std::fs::write(other.as_path().join("below/kept"), "9876543210").unwrap();
    let mut guest = go_on(other, &state);
    assert_eq!(guest.read(kept, handle, 2, 3).1, b"765");
    let attributes = guest.ask(GETATTR, below, &[0; 16]);
    assert_ne!(u32_at(&attributes, 76) & libc::S_IFDIR, 0);
    // Ids of its own life do not meet those of the old one.
    let beside = guest.node(ROOT, "beside");
    assert!(beside > kept, "{beside} {kept}");
    let another = guest.open(beside);
    assert_ne!(another, handle);
    assert_eq!(guest.read(beside, another, 0, 3).1, b"abc");
    // And once more.
    let state = paused(&mut guest);
    let mut guest = go_on(tree(), &state);
    assert_eq!(guest.read(kept, handle, 2, 3).1, b"234");
    assert_eq!(guest.read(beside, another, 0, 3).1, b"abc");
}

/// As `go_on` and `guest_of`, with the tree as root directory of the server's thread, as in a VMM.
fn in_root(tree: TempDir, state: Option<&DeviceState>) -> Guest {
    let root = tree.as_path().to_owned();
    guest_made_by(tree, &root, state, |fs| {
        let start = || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            nix::unistd::chroot(&root).unwrap();
            fs.start_thread(true).unwrap();
        };
        std::thread::scope(|scope| scope.spawn(start).join().unwrap());
    })
}

#[test]
fn files_are_found_where_the_tree_is_the_root_directory() {
    if !nix::unistd::geteuid().is_root() {
        let refused = nix::unistd::chroot("/");
        assert_eq!(refused, Err(nix::errno::Errno::EPERM));
        return;
    }
    let tree_of_first = tree();
    let root = tree_of_first.as_path().to_owned();
    let mut guest = in_root(tree_of_first, None);
    guest.init();
    let kept = find_kept(&mut guest);
    let handle = guest.open(kept);
    let beside = guest.node(ROOT, "beside");
    // Moved out of the tree: there is no name for it any more.
    let outside = tree();
    std::fs::rename(root.join("beside"), outside.as_path().join("beside")).unwrap();
    let state = paused(&mut guest);

    let mut guest = in_root(tree(), Some(&state));
    assert_eq!(guest.read(kept, handle, 2, 3).1, b"234");
    assert_eq!(guest.ask_in_pieces(GETATTR, beside, &[0; 16], 4096).0, -libc::EIO);
}

#[test]
fn a_file_without_a_name_is_an_error_of_its_own() {
    let mut guest = mounted();
    let root = guest.directory.as_path().to_owned();
    let beside = guest.node(ROOT, "beside");
    let lost = guest.open(beside);
    let kept = find_kept(&mut guest);
    let handle = guest.open(kept);
    std::fs::remove_file(root.join("beside")).unwrap();
    let state = paused(&mut guest);

    // Another file has taken the name meanwhile.
    let mut guest = go_on(tree(), &state);
    assert_eq!(guest.read(beside, lost, 0, 3).0, -libc::EIO);
    assert_eq!(guest.ask_in_pieces(GETATTR, beside, &[0; 16], 4096).0, -libc::EIO);
    assert_eq!(guest.read(kept, handle, 2, 3).1, b"234");
}

#[test]
fn a_file_that_the_other_tree_does_not_have_is_an_error_of_its_own() {
    let mut guest = mounted();
    let beside = guest.node(ROOT, "beside");
    let handle = guest.open(beside);
    let state = paused(&mut guest);
    let other = tree();
    std::fs::remove_file(other.as_path().join("beside")).unwrap();
    let mut guest = go_on(other, &state);
    assert_eq!(guest.read(beside, handle, 0, 3).0, -libc::EIO);
    assert_eq!(
        u32_at(&guest.ask(GETATTR, ROOT, &[0; 16]), 76) & libc::S_IFMT,
        libc::S_IFDIR
    );
}

#[test]
fn a_tree_that_was_not_mounted_needs_nothing() {
    let mut guest = guest();
    let state = paused(&mut guest);
    assert!(saved(&state).known.is_empty());
    let mut guest = go_on(tree(), &state);
    guest.init();
    guest.lookup(ROOT, "beside");
}

/// A template: the guest has mounted the tree and looked at nothing in it.
#[test]
fn of_a_tree_that_was_only_mounted_the_root_is_known() {
    let mut guest = guest();
    guest.init();
    let state = paused(&mut guest);
    assert!(!saved(&state).known.is_empty());
    for _ in 0..2 {
        let mut clone = go_on(tree(), &state);
        let attributes = clone.ask(GETATTR, ROOT, &[0; 16]);
        assert_eq!(u32_at(&attributes, 76) & libc::S_IFMT, libc::S_IFDIR);
        let beside = clone.node(ROOT, "beside");
        let handle = clone.open(beside);
        assert_eq!(clone.read(beside, handle, 0, 3).1, b"abc");
    }
}

#[test]
fn what_was_agreed_on_with_the_guest_holds() {
    let mut guest = guest();
    guest.init();
    let state = paused(&mut guest);
    let mut guest = go_on(tree(), &state);
    // In the long form, which is agreed on together with ACLs: size, flags, more flags, padding.
    let mut set = words(&[5, 0, 0, 0]);
    set.extend(b"user.color\0green");
    guest.ask(SETXATTR, ROOT, &set);
    let mut get = words(&[64, 0]);
    get.extend(b"user.color\0");
    assert_eq!(guest.ask(GETXATTR, ROOT, &get), b"green");
}

/// Flags of the only descriptor of this process for `path` that can write.
fn flags_of(path: &Path) -> i32 {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let of_path = descriptors
        .map(|entry| entry.unwrap().path())
        .filter(|entry| std::fs::read_link(entry).is_ok_and(|target| target == path));
    let flags = of_path.filter_map(|entry| {
        let number = entry.file_name()?.to_str()?.to_owned();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        i32::from_str_radix(flags.trim(), 8).ok()
    });
    let flags: Vec<_> = flags.filter(|flags| flags & libc::O_ACCMODE != 0).collect();
    assert_eq!(flags.len(), 1, "{flags:?}");
    flags[0]
}

#[test]
fn open_files_are_opened_as_they_were() {
    let mut guest = mounted();
    let root = guest.directory.as_path().to_owned();
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_APPEND | libc::O_DIRECT;
    let mut create = words(&[flags as u32, libc::S_IFREG | 0o640, 0, 0]);
    create.extend(b"log\0");
    let (error, entry) = guest.ask_in_pieces(CREATE, ROOT, &create, 4096);
    assert_eq!(error, 0);
    let (node, handle) = (u64_at(&entry, 0), u64_at(&entry, 128));
    let unwanted = libc::O_APPEND | libc::O_DIRECT;
    assert_eq!(flags_of(&root.join("log")) & unwanted, 0);
    let state = paused(&mut guest);

    let other = tree();
    let log = other.as_path().join("log");
    std::fs::write(&log, "0123").unwrap();
    let mut guest = go_on(other, &state);
    assert_eq!(std::fs::read(&log).unwrap(), b"0123");
    assert_eq!(flags_of(&log) & unwanted, 0);
    let mut write = handle.to_le_bytes().to_vec();
    write.extend(1u64.to_le_bytes());
    write.extend(words(&[2, 0, 0, 0, 0, 0]));
    write.extend(b"ab");
    guest.ask(WRITE, node, &write);
    assert_eq!(std::fs::read(&log).unwrap(), b"0ab3");
}

#[test]
fn a_file_that_lost_the_name_it_was_found_by_is_found_by_another() {
    let mut guest = mounted();
    let root = guest.directory.as_path().to_owned();
    let beside = guest.node(ROOT, "beside");
    let handle = guest.open(beside);
    std::fs::hard_link(root.join("beside"), root.join("below/another")).unwrap();
    std::fs::remove_file(root.join("beside")).unwrap();
    let state = paused(&mut guest);
    guest.fs.resume();
    assert_eq!(guest.read(beside, handle, 0, 3).1, b"abc");

    let other = tree();
    std::fs::write(other.as_path().join("below/another"), "xyz").unwrap();
    let mut guest = go_on(other, &state);
    assert_eq!(guest.read(beside, handle, 0, 3).1, b"xyz");
}

#[test]
fn files_that_were_renamed_forgotten_and_closed_are_kept_as_they_are_now() {
    let mut guest = mounted();
    let root = guest.directory.as_path().to_owned();
    let beside = guest.node(ROOT, "beside");
    let handle = guest.open(beside);
    // The guest has forgotten the directory by which it found the file, which a kernel does not do.
    let below = guest.node(ROOT, "below");
    let kept = guest.node(below, "kept");
    guest.forget(below);
    std::fs::rename(root.join("beside"), root.join("below/moved")).unwrap();
    let release = [&handle.to_le_bytes()[..], &[0; 16]].concat();
    guest.ask(RELEASE, beside, &release);
    let state = paused(&mut guest);

    let other = tree();
    std::fs::write(other.as_path().join("below/moved"), "xyz").unwrap();
    let mut guest = go_on(other, &state);
    assert_eq!(guest.read(beside, handle, 0, 3).0, -libc::EBADF);
    let handle = guest.open(beside);
    assert_eq!(guest.read(beside, handle, 0, 3).1, b"xyz");
    let handle = guest.open(kept);
    assert_eq!(guest.read(kept, handle, 0, 3).1, b"012");
    assert_eq!(
        guest.ask_in_pieces(GETATTR, below, &[0; 16], 4096).0,
        -libc::EBADF
    );
}

#[test]
fn what_no_server_wrote_is_refused() {
    let mut of_first = guest();
    of_first.init();
    let whole = paused(&mut of_first);
    let mut known = saved(&whole).known.clone();
    // The message by which the tree was mounted is whole, the library's part is not.
    known.truncate(known.len() - 1);
    refused(&whole, &known);
    refused(&whole, &[0xff; 100]);
}

fn saved(state: &DeviceState) -> &WorkState {
    let DeviceState::Fs(saved) = state else {
        panic!("{state:?}");
    };
    saved
}

fn refused(whole: &DeviceState, known: &[u8]) {
    let state = DeviceState::Fs(WorkState {
        queues: whole.queues().to_vec(),
        known: known.to_vec(),
    });
    let tree = TempDir::new().unwrap();
    let root = File::open(tree.as_path()).unwrap();
    let mut fs = Fs::new(0, "share", root, File::open("/proc/self/fd").unwrap()).unwrap();
    fs.set_queue_events((0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect());
    fs.start_thread(false).unwrap();
    fs.restore_state(&state).unwrap();
    let memory = test_queue::memory();
    let queues = [TestQueue::new(&memory, 0, 128), TestQueue::new(&memory, 1, 512)];
    let activation = test_queue::activation(&memory, &[&queues[0], &queues[1]], fs.features());
    assert!(fs.activate(activation).is_err());
    let inactive = DeviceState::Fs(WorkState {
        queues: Vec::new(),
        known: known.to_vec(),
    });
    assert!(matches!(
        fs.restore_state(&inactive),
        Err(RestoreError::Queues { queues: 2, saved: 0 })
    ));
    assert!(matches!(
        fs.restore_state(&DeviceState::Rng(None)),
        Err(RestoreError::Kind)
    ));
}
