#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;

const OWNER: Owner<'_> = Owner {
    container: "c",
    namespace: "n",
};

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("bulkhead-io-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn fifo(path: &Path) -> String {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn targets_are_told_apart() {
    assert_eq!(target("").unwrap(), Target::None);
    assert_eq!(target("/a/b").unwrap(), Target::Fifo(Path::new("/a/b")));
    assert_eq!(
        target("file:///var/log/a%20b").unwrap(),
        Target::File("/var/log/a b".into())
    );
    assert_eq!(
        target("binary:///bin/l?k=v&x=a%26b&flag").unwrap(),
        Target::Binary {
            path: "/bin/l".into(),
            arguments: ["k", "v", "x", "a&b", "flag", ""].map(String::from).into()
        }
    );
    for bad in [
        "relative",
        "file://relative",
        "npipe:///x",
        "file:///a%2",
        "file:///a%00",
    ] {
        assert!(matches!(target(bad), Err(IoError::Scheme(_))), "{bad}");
    }
}

#[tokio::test]
async fn a_fifo_stays_whole_while_nobody_reads_and_ends_when_both_keepers_are_gone() {
    let dir = directory("fifo");
    let path = fifo(&dir.join("out"));
    let paths = Paths {
        stdout: path.clone(),
        ..Paths::default()
    };
    let stdio = open(&paths, OWNER).await.unwrap();
    let stream = stdio.stdout.unwrap();
    let mut writer = File::from(stream.far_end);
    writer.write_all(b"hello").unwrap();
    let mut client = open_fifo(Path::new(&path), false).unwrap();
    drop(writer);
    drop(stream.keeper);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn stdin_ends_only_when_the_keeper_is_dropped() {
    let dir = directory("stdin");
    let path = fifo(&dir.join("in"));
    let stdio = open(
        &Paths {
            stdin: path.clone(),
            ..Paths::default()
        },
        OWNER,
    )
    .await
    .unwrap();
    let stream = stdio.stdin.unwrap();
    let mut reader = File::from(stream.far_end);
    let mut client = open_fifo(Path::new(&path), true).unwrap();
    client.write_all(b"x").unwrap();
    drop(client);
    let mut byte = [0; 8];
    assert_eq!(reader.read(&mut byte).unwrap(), 1);
    assert_eq!(
        reader.read(&mut byte).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
    drop(stream.keeper);
    assert_eq!(reader.read(&mut byte).unwrap(), 0);
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn log_files_are_appended_and_their_directories_made() {
    let dir = directory("file");
    let path = dir.join("a/b/log");
    let uri = format!("file://{}", path.display());
    let paths = Paths {
        stdout: uri.clone(),
        stderr: uri,
        ..Paths::default()
    };
    for text in ["1", "2"] {
        let stdio = open(&paths, OWNER).await.unwrap();
        File::from(stdio.stdout.unwrap().far_end)
            .write_all(text.as_bytes())
            .unwrap();
        File::from(stdio.stderr.unwrap().far_end).write_all(b"e").unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1e2e");
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn a_regular_file_is_not_a_fifo() {
    let dir = directory("regular");
    std::fs::write(dir.join("f"), "").unwrap();
    let paths = Paths {
        stdout: dir.join("f").to_str().unwrap().into(),
        ..Paths::default()
    };
    assert!(matches!(open(&paths, OWNER).await, Err(IoError::NotFifo(_))));
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn a_logging_program_gets_its_descriptors_arguments_and_environment() {
    let dir = directory("binary");
    let out = dir.join("out");
    let script = dir.join("logger");
    let text = format!(
        "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\" > {0}\ncat <&3 >> {0}\ncat <&4 >> {0}\necho end >> {0}\n",
        out.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let paths = Paths {
        stdout: format!("binary://{}?k=v", script.display()),
        ..Paths::default()
    };
    let stdio = open(&paths, OWNER).await.unwrap();
    let (stdout, stderr) = (stdio.stdout.unwrap(), stdio.stderr.unwrap());
    File::from(stdout.far_end).write_all(b"one\n").unwrap();
    File::from(stderr.far_end).write_all(b"two\n").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let text = std::fs::read_to_string(&out).unwrap_or_default();
        if text.ends_with("end\n") {
            assert_eq!(text, "n/c k v\none\ntwo\nend\n");
            break;
        }
        assert!(std::time::Instant::now() < deadline, "logger wrote {text:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    drop((stdout.keeper, stderr.keeper));
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn a_missing_logging_program_is_an_error() {
    let paths = Paths {
        stdout: "binary:///nonexistent/logger".into(),
        ..Paths::default()
    };
    assert!(matches!(open(&paths, OWNER).await, Err(IoError::Logger(..))));
}

proptest! {
    #[test]
    fn decoding_undoes_encoding(text in "[^\0]{0,20}") {
        let encoded: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
        prop_assert_eq!(decode(&encoded), Some(text));
    }

    #[test]
    fn any_name_is_answered(text in ".{0,40}") {
        let _ = target(&text);
    }
}
