//! KVM: the device, what it says of itself, and the proof.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_vmm::probe::{self, Outcome, Step};

use super::report::{Report, Verdict};

#[cfg(test)]
mod tests;

const GROUP: &str = "KVM";
const GUEST: &str = "Tiny guest";

/// Adds KVM's requirements. Takes at most `limit` and a second.
pub fn check(report: &mut Report, device: &Path, limit: Duration) {
    // The tiny guest is x86-64 machine code, so this program exists for no other architecture.
    report.add(
        GROUP,
        "x86-64 processor",
        Verdict::Yes,
        std::env::consts::ARCH,
        "",
    );

    let name = device.display().to_string();
    let kvm = match OpenOptions::new().read(true).write(true).open(device) {
        Ok(kvm) => kvm,
        Err(error) => {
            let (reason, remedy) = explain_open(device, &error);
            report.add(GROUP, name, Verdict::No, reason, remedy);
            report.add(
                GUEST,
                "all steps",
                Verdict::Unknown,
                "there is no KVM to run it on",
                "",
            );
            return;
        }
    };
    report.add(GROUP, name, Verdict::Yes, loaded_modules(), "");
    let second = match kvm.try_clone() {
        Ok(second) => second,
        Err(error) => {
            let reason = format!("cannot duplicate a descriptor: {error}");
            report.add(
                GUEST,
                "all steps",
                Verdict::No,
                reason,
                "raise the limit of open files",
            );
            return;
        }
    };
    if check_capabilities(report, kvm) {
        check_guest(report, &probe::run(second, limit));
    } else {
        report.add(GUEST, "all steps", Verdict::Unknown, "the device is not KVM", "");
    }
}

/// Adds API version and capabilities; tells whether it is KVM at all.
fn check_capabilities(report: &mut Report, kvm: File) -> bool {
    let found = probe::capabilities(kvm);
    let is_kvm = found.api_version == probe::API_VERSION;
    let remedy = if is_kvm { "" } else { "use a Linux kernel with KVM" };
    let verdict = if is_kvm { Verdict::Yes } else { Verdict::No };
    report.add(
        GROUP,
        "API version",
        verdict,
        format!("{} (needed: {})", found.api_version, probe::API_VERSION),
        remedy,
    );
    for capability in &found.list {
        let (verdict, remedy) = if capability.present {
            (Verdict::Yes, "")
        } else {
            (
                Verdict::No,
                "use a newer host kernel, or the KVM of real hardware",
            )
        };
        report.add(
            GROUP,
            format!("KVM_CAP_{}", capability.name),
            verdict,
            capability.reason,
            remedy,
        );
    }
    is_kvm
}

/// Adds the steps of the tiny guest.
fn check_guest(report: &mut Report, result: &probe::Report) {
    let failure = result.failure.as_ref().map(|failure| chain(failure));
    // A failure outside every step (the VM could not be built) has no line of its own below.
    let in_step = result
        .steps
        .iter()
        .any(|(_, outcome)| *outcome == Outcome::Failed);
    if let (Some(reason), false) = (&failure, in_step) {
        report.add(GUEST, "virtual machine", Verdict::No, reason.clone(), remedy());
    }
    for (step, outcome) in &result.steps {
        let (verdict, reason, remedy) = match outcome {
            Outcome::Passed => (Verdict::Yes, String::new(), String::new()),
            Outcome::NotOffered => (Verdict::NotOffered, not_offered(*step).to_owned(), String::new()),
            Outcome::Failed => (Verdict::No, failure.clone().unwrap_or_default(), remedy()),
            Outcome::NotReached => (
                Verdict::Unknown,
                "the guest did not get this far".to_owned(),
                String::new(),
            ),
        };
        report.add(GUEST, step.description(), verdict, reason, remedy);
    }
}

fn not_offered(step: Step) -> &'static str {
    match step {
        Step::TscDeadline => "KVM offers no TSC-deadline timer; guests use the periodic one",
        _ => "the guest's CPUID does not have it, so kernels do without",
    }
}

fn remedy() -> String {
    let hint = "this /dev/kvm cannot run ordinary guests; use a machine with hardware virtualization, or the emulated host (docs/emulated-host.md)";
    match software_kvm() {
        Some(module) => format!("{module} implements KVM without the processor's help: {hint}"),
        None => hint.to_owned(),
    }
}

/// Why the device cannot be opened, and what helps.
fn explain_open(device: &Path, error: &std::io::Error) -> (String, String) {
    match error.kind() {
        ErrorKind::NotFound => explain_absence(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        ErrorKind::PermissionDenied => {
            let owner = std::fs::metadata(device)
                .map(|metadata| group_name(metadata.gid()))
                .unwrap_or_default();
            (
                "it exists, but this user may not open it".into(),
                format!("run as root, or join its group: usermod -aG {owner} \"$USER\", then log in again"),
            )
        }
        _ => (
            format!("it cannot be opened: {error}"),
            "modprobe kvm_intel or kvm_amd, and look at dmesg".into(),
        ),
    }
}

/// Why there is no device, from `/proc/cpuinfo`.
fn explain_absence(cpuinfo: &str) -> (String, String) {
    let has = |flag: &str| {
        cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("flags"))
            .is_some_and(|flags| flags.split_whitespace().any(|word| word == flag))
    };
    let module = if has("vmx") {
        "kvm_intel"
    } else if has("svm") {
        "kvm_amd"
    } else {
        return (
            "it does not exist, and the processor shows neither VMX nor SVM".into(),
            "switch virtualization on in the firmware; in a virtual machine, switch nested virtualization on below it".into(),
        );
    };
    (
        format!("it does not exist, but the processor has what {module} needs"),
        format!("modprobe {module}"),
    )
}

/// Name of a group, or its number. (glibc's lookup does not work in static programs.)
fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    find_group(&groups, gid).unwrap_or_else(|| gid.to_string())
}

fn find_group(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

/// The loaded modules that make up KVM.
fn loaded_modules() -> String {
    let mut names: Vec<String> = module_names().filter(|name| name.starts_with("kvm")).collect();
    names.sort();
    if names.is_empty() {
        "it opens".into()
    } else {
        format!("it opens; loaded: {}", names.join(", "))
    }
}

/// A loaded KVM implementation that is neither Intel's nor AMD's.
fn software_kvm() -> Option<String> {
    module_names().find(|name| name.starts_with("kvm_") && !matches!(name.as_str(), "kvm_intel" | "kvm_amd"))
}

fn module_names() -> impl Iterator<Item = String> {
    std::fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
