//! The suites of integration tests, and which of them a run takes.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::Arguments;
use crate::host::Containerd;
use crate::workspace;

/// A program of tests, in one of the ways it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// containerd's task service, driven by `ctr`
    Tasks,
    /// CRI, sandboxes made by containerd's `podsandbox` controller
    Cri,
    /// CRI, sandboxes made by the shim's Sandbox API (containerd 2)
    CriShim,
    /// The agent without a virtual machine
    Agent,
    /// A fault at every step, with a shim built for that
    Faults,
    /// Cycles, and many pods at once, for figures (only when it is named)
    Soak,
}

impl Suite {
    /// The program of its tests.
    pub fn program(self) -> &'static str {
        match self {
            Self::Tasks | Self::Faults | Self::Soak => "integration",
            Self::Cri | Self::CriShim => "cri",
            Self::Agent => "guest",
        }
    }

    /// The runtime handler of its pods.
    pub fn handler(self) -> &'static str {
        match self {
            Self::CriShim => "kata-shim",
            Self::Tasks | Self::Cri | Self::Agent | Self::Faults | Self::Soak => "kata",
        }
    }

    fn runs_with(self, containerd: Containerd) -> bool {
        match self {
            Self::Tasks | Self::Cri => true,
            Self::CriShim | Self::Agent | Self::Faults | Self::Soak => containerd == Containerd::V2_1,
        }
    }

    /// The option of the test program by which figures are seen of tests that pass: at their end, or at once.
    pub fn figures(self) -> Option<&'static str> {
        match self {
            Self::Faults => Some("--show-output"),
            Self::Soak => Some("--nocapture"),
            Self::Tasks | Self::Cri | Self::CriShim | Self::Agent => None,
        }
    }

    /// What its program's tests are chosen by, beside the filter of the command line: a program may be of several suites.
    fn selection(self) -> &'static [&'static str] {
        match self {
            Self::Tasks => &["--skip", "faults::", "--skip", "soak::"],
            Self::Faults => &["faults::"],
            Self::Soak => &["soak::"],
            Self::Cri | Self::CriShim | Self::Agent => &[],
        }
    }

    /// Which of its tests every change has to pass: all of them with containerd 2.1 and its own sandboxes; with others the
    /// tests of what is done otherwise then. Parts of names; none: all.
    fn sample(self, containerd: Containerd) -> &'static [&'static str] {
        match (self, containerd) {
            // The start of a shim, its options and address, sandboxes by annotations, exits, crashes and restarts; what
            // `bulkhead restore` asks for.
            (Self::Tasks, Containerd::V1_7) => &[
                "crash::",
                "events::",
                "pods::",
                "task::",
                "containers_outlive",
                "a_pod_is_restored",
            ],
            // What the image and the annotations of the CRI plugin say, networks, statistics, the end of pods.
            (Self::Cri, Containerd::V1_7) => &["sandbox::", "ends::", "network::", "figures_of"],
            // All that is done when a pod is made, changed and removed; what is in it knows no difference.
            (Self::CriShim, _) => &[
                "cgroup::",
                "sandbox::",
                "ends::",
                "forward::",
                "resources::",
                "figures_of",
            ],
            _ => &[],
        }
    }
}

/// A suite and the containerd it finds.
pub struct Job {
    /// Begins each line of its output, and names the directory of its logs.
    pub name: String,
    /// What is run.
    pub suite: Suite,
    /// With what.
    pub containerd: Containerd,
    /// Parts of the names of its tests; none: all.
    tests: &'static [&'static str],
}

impl Job {
    /// Whether `arguments` ask for every suite.
    pub fn are_all(arguments: &Arguments) -> bool {
        arguments.suite.is_empty() && arguments.containerd.is_none() && arguments.filter.is_empty()
    }

    /// What `arguments` ask for; those that take longest first, so that none of them is left for the end.
    pub fn chosen(arguments: &Arguments) -> Vec<Self> {
        let containerds = match arguments.containerd {
            Some(one) => vec![one],
            None => Containerd::ALL.to_vec(),
        };
        let wanted = |suite: &Suite| {
            if arguments.suite.is_empty() {
                // A filter is one of containers' and pods' tests.
                *suite != Suite::Soak && (*suite != Suite::Agent || arguments.filter.is_empty())
            } else {
                arguments.suite.contains(suite)
            }
        };
        let suites = Suite::value_variants().iter().copied().filter(wanted);
        let mut jobs: Vec<_> = suites
            .flat_map(|suite| containerds.iter().map(move |containerd| (suite, *containerd)))
            .filter(|(suite, containerd)| {
                // Faults with another containerd are for who asks for both.
                let asked = *suite == Suite::Faults
                    && arguments.suite.contains(suite)
                    && arguments.containerd == Some(*containerd);
                asked || suite.runs_with(*containerd)
            })
            .map(|(suite, containerd)| Self {
                name: match suite {
                    Suite::Tasks => containerd.version().to_owned(),
                    Suite::Cri => format!("{}-cri", containerd.version()),
                    Suite::CriShim => format!("{}-cri-shim", containerd.version()),
                    Suite::Agent => "agent".to_owned(),
                    Suite::Faults => format!("{}-faults", containerd.version()),
                    Suite::Soak => format!("{}-soak", containerd.version()),
                },
                suite,
                containerd,
                tests: if Self::are_all(arguments) && !arguments.everything {
                    suite.sample(containerd)
                } else {
                    &[]
                },
            })
            .collect();
        jobs.sort_by_key(|job| !job.tests.is_empty());
        jobs
    }

    /// Arguments of the suite's program, beside `filter` of the command line. A filter takes the place of the suite's own
    /// choice where that would only add to what is chosen.
    pub fn arguments<'a>(&'a self, filter: &'a [String]) -> impl Iterator<Item = String> + 'a {
        let selection = self.suite.selection();
        let adds = selection.first().is_some_and(|first| !first.starts_with('-'));
        let selection = if adds && !filter.is_empty() {
            &[]
        } else {
            selection
        };
        let tests = if filter.is_empty() { self.tests } else { &[] };
        let own = selection.iter().chain(tests).map(ToString::to_string);
        own.chain(filter.to_owned())
    }

    /// An empty directory for what the tests leave behind.
    pub fn logs(&self) -> Result<PathBuf> {
        let directory = workspace::path("target/integration").join(&self.name);
        if directory.exists() {
            fs::remove_dir_all(&directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_chooses_its_tests_and_a_filter_of_them() {
        let of = |suite, tests, filter: &[&str]| -> Vec<String> {
            let job = Job {
                name: "job".to_owned(),
                suite,
                containerd: Containerd::V2_1,
                tests,
            };
            let filter: Vec<String> = filter.iter().map(ToString::to_string).collect();
            job.arguments(&filter).collect()
        };
        assert_eq!(of(Suite::Faults, &[], &[]), ["faults::"]);
        assert_eq!(
            of(Suite::Faults, &[], &["--exact", "faults::a"]),
            ["--exact", "faults::a"]
        );
        assert_eq!(
            of(Suite::Tasks, &["task::"], &["crash::"]),
            ["--skip", "faults::", "--skip", "soak::", "crash::"]
        );
        assert_eq!(of(Suite::Cri, &["sandbox::"], &[]), ["sandbox::"]);
        assert!(of(Suite::Cri, &[], &[]).is_empty());
    }
}
