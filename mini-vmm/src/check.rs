//! What this host offers to a machine, and what to do about what is missing: `mini-vmm check`.
//!
//! It only looks: nothing is changed, no guest runs.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::kvm::{self, CAPABILITIES, Machine};

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether a machine can run here.
    pub ok: bool,
    /// The hypervisor.
    pub kvm: Kvm,
}

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

/// Looks at the host.
pub fn check(kvm: &Path) -> Report {
    let kvm = check_kvm(kvm);
    Report {
        ok: kvm.problem.is_none(),
        kvm,
    }
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
        self.kvm.fmt(f)
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
