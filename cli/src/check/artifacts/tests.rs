use std::fs;

use super::*;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn elf(machine: u8) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64, 0);
    bytes[18] = machine;
    bytes
}

#[test]
fn kernels_are_told_by_their_elf_header() {
    let scratch = Scratch::new("elf");
    assert!(is_x86_elf(&scratch.file("good", &elf(62))).unwrap());
    assert!(!is_x86_elf(&scratch.file("arm", &elf(183))).unwrap());
    assert!(!is_x86_elf(&scratch.file("bzimage", b"MZ some compressed kernel with a long head")).unwrap());
    assert!(!is_x86_elf(&scratch.file("empty", b"")).unwrap());
    assert!(is_x86_elf(&scratch.0.join("absent")).is_err());
}

#[test]
fn images_are_told_by_their_superblock() {
    let scratch = Scratch::new("erofs");
    let mut image = vec![0; 4096];
    image[1024..1028].copy_from_slice(&EROFS_MAGIC.to_le_bytes());
    assert!(is_erofs(&scratch.file("good", &image)).unwrap());
    assert!(!is_erofs(&scratch.file("zero", &[0; 4096])).unwrap());
    assert!(!is_erofs(&scratch.file("short", &image[..1026])).unwrap());
}

#[test]
fn programs_need_the_executable_bit() {
    let scratch = Scratch::new("program");
    let path = scratch.file("program", &elf(62));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(!is_program(&path).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(is_program(&path).unwrap());
}

#[test]
fn a_wrong_kernel_is_a_failed_requirement_with_its_path() {
    let scratch = Scratch::new("configuration");
    let kernel = scratch.file("vmlinux", b"not an ELF file, whatever it is");
    let configuration = Configuration {
        kernel: kernel.clone(),
        ..Configuration::default()
    };
    let mut report = Report::default();
    check(&mut report, &configuration);
    let failed = report.failed();
    assert_eq!(failed[0].name, "guest kernel");
    assert!(
        failed[0].reason.contains(kernel.to_str().unwrap()),
        "{}",
        failed[0].reason
    );
}
