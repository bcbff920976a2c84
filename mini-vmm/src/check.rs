//! What this host offers to a machine, and what to do about what is missing: `mini-vmm check`.
//!
//! It only looks: nothing is changed, no guest runs.

use std::fmt;
use std::path::{Path, PathBuf};

use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_host_proxy::{files, sandbox};
use serde::Serialize;

use crate::kvm::{self, CAPABILITIES, Machine};

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether a machine can run here.
    pub ok: bool,
    /// The hypervisor.
    pub kvm: Kvm,
    /// The GPU nodes, by name.
    pub gpus: Vec<Node>,
    /// What keeps a guest in that has taken the monitor over.
    pub sandbox: Sandbox,
}

/// What the kernel has for the sandbox.
#[derive(Debug, Serialize)]
pub struct Sandbox {
    /// Whether threads can be kept from system calls (seccomp).
    pub seccomp: bool,
    /// Whether the process can be kept from files (Landlock).
    pub landlock: bool,
    /// Why there is no sandbox at all, and the remedy.
    pub problem: Option<String>,
}

/// A GPU node, for `--gpu drm:NODE`.
#[derive(Debug, Serialize)]
pub struct Node {
    /// Where it is.
    pub path: PathBuf,
    /// Its kernel driver, if a guest can have it.
    pub driver: Option<String>,
    /// The driver's version: major, minor, patch level.
    pub version: Option<[i32; 3]>,
    /// Why a guest cannot have it, and the remedy.
    pub problem: Option<String>,
}

/// Where GPU nodes are.
pub const GPU_NODES: &str = "/dev/dri";

/// What is known of the hypervisor.
#[derive(Debug, Serialize)]
pub struct Kvm {
    /// Its device.
    pub path: PathBuf,
    /// Version of its interface, if it answered.
    pub api_version: Option<i32>,
    /// Its capabilities, as far as the machine uses them.
    pub capabilities: Vec<Offer>,
    /// Frequency of the time-stamp counter in kHz, if it says.
    pub tsc_khz: Option<u32>,
    /// Why no machine can run, and the remedy.
    pub problem: Option<String>,
}

/// One capability of KVM.
#[derive(Debug, Serialize)]
pub struct Offer {
    /// Name without the `KVM_CAP_` prefix.
    pub name: &'static str,
    /// What KVM answers: 0 is no, 1 is yes, more is a number with a meaning of its own.
    pub value: i32,
    /// Whether a machine needs it.
    pub required: bool,
    /// What for.
    pub purpose: &'static str,
}

/// Looks at the host: at KVM behind `kvm` and the GPU nodes in the folder `nodes`.
pub fn check(kvm: &Path, nodes: &Path) -> Report {
    let kvm = check_kvm(kvm);
    Report {
        ok: kvm.problem.is_none(),
        kvm,
        gpus: check_nodes(nodes),
        sandbox: check_sandbox(),
    }
}

fn check_sandbox() -> Sandbox {
    let problem = sandbox::available().err().map(|error| error.to_string());
    Sandbox {
        seccomp: problem.is_none(),
        landlock: files::available(),
        problem,
    }
}

fn check_nodes(folder: &Path) -> Vec<Node> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("card") || name.starts_with("renderD")
        })
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| match DrmDriver::new(&path) {
            Ok(driver) => {
                let identity = driver.identity();
                Node {
                    path,
                    driver: Some(identity.name.clone()),
                    version: Some(identity.version),
                    problem: None,
                }
            }
            Err(error) => Node {
                path,
                driver: None,
                version: None,
                problem: Some(error.to_string()),
            },
        })
        .collect()
}

fn check_kvm(path: &Path) -> Kvm {
    let mut report = Kvm {
        path: path.into(),
        api_version: None,
        capabilities: Vec::new(),
        tsc_khz: None,
        problem: None,
    };
    let kvm = match kvm::open(path) {
        Ok(kvm) => kvm,
        Err(error) => {
            report.problem = Some(error.to_string());
            return report;
        }
    };
    report.api_version = Some(kvm.get_api_version());
    report.capabilities = CAPABILITIES
        .iter()
        .map(|c| Offer {
            name: c.name,
            value: kvm.check_extension_int(c.cap),
            required: c.required,
            purpose: c.purpose,
        })
        .collect();
    let machine = Machine::new(path).and_then(|machine| machine.create_vcpu(0));
    match machine {
        Ok(vcpu) => report.tsc_khz = vcpu.get_tsc_khz().ok(),
        Err(error) => report.problem = Some(error.to_string()),
    }
    report
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kvm.fmt(f)?;
        if self.gpus.is_empty() {
            writeln!(
                f,
                "GPU nodes: none in {GPU_NODES}: use the embedded GPU (--gpu soft) or load a GPU's kernel driver (modprobe vgem is one for tests)"
            )?;
        } else {
            writeln!(f, "GPU nodes:")?;
        }
        self.gpus.iter().try_for_each(|node| node.fmt(f))?;
        self.sandbox.fmt(f)
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = self.problem.as_deref().unwrap_or("yes");
        writeln!(f, "Sandbox:")?;
        writeln!(f, "  system calls are filtered (seccomp): {problem}")?;
        let landlock = match self.landlock {
            true => "yes",
            false => {
                "no (optional): boot the kernel with lsm=landlock,... if it has CONFIG_SECURITY_LANDLOCK"
            }
        };
        writeln!(f, "  files are restricted (Landlock): {landlock}")
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match (&self.problem, &self.driver, self.version) {
            (None, Some(driver), Some([major, minor, patch])) => {
                writeln!(
                    f,
                    "  {path}: {driver} {major}.{minor}.{patch}, use it with --gpu drm:{path}"
                )
            }
            (problem, ..) => writeln!(
                f,
                "  {path}: not usable: {}",
                problem.as_deref().unwrap_or("unknown")
            ),
        }
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Some(problem) => writeln!(f, "KVM: not usable: {problem}")?,
            None => writeln!(f, "KVM: {} is usable", self.path.display())?,
        }
        if let Some(version) = self.api_version {
            writeln!(f, "  API version {version}")?;
        }
        for offer in &self.capabilities {
            let answer = match (offer.value, offer.required) {
                (value, true) if value <= 0 => "MISSING".to_string(),
                (value, false) if value <= 0 => "no (optional)".to_string(),
                (1, _) => "yes".to_string(),
                (value, _) => value.to_string(),
            };
            writeln!(f, "  {:<22} {answer:<14} {}", offer.name, offer.purpose)?;
        }
        match self.tsc_khz {
            Some(khz) => writeln!(f, "  time-stamp counter     {khz} kHz"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_that_is_not_usable_says_why_and_other_files_are_left_out() {
        let folder = std::env::temp_dir().join(format!("mini-vmm-nodes-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        for name in ["renderD128", "card0", "by-path"] {
            std::fs::write(folder.join(name), "").unwrap();
        }
        let nodes = check_nodes(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let names: Vec<_> = nodes
            .iter()
            .map(|n| n.path.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["card0", "renderD128"]);
        for node in &nodes {
            assert!(
                node.problem.as_ref().unwrap().contains("is not a DRM node"),
                "{node}"
            );
            assert!(node.to_string().contains("not usable"), "{node}");
        }
    }

    #[test]
    fn a_host_without_gpu_nodes_is_told_about_the_embedded_gpu() {
        let report = check(Path::new("/nonexistent"), Path::new("/nonexistent"));
        assert!(!report.ok);
        let text = report.to_string();
        assert!(
            text.contains("modprobe kvm-intel") && text.contains("--gpu soft"),
            "{text}"
        );
    }
}
