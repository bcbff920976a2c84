//! Which host driver: what programs read from their command lines (`soft`, `drm:NODE`), and the driver itself.

use crate::driver::HostDriver;
use crate::drm::DrmDriver;
use crate::sandbox::Sandbox;
use crate::soft::{SoftConfig, SoftDriver};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A GPU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The embedded one.
    Soft,
    /// A DRM node.
    Drm(PathBuf),
}

/// Why there is no driver.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// The node.
    #[error("{0}")]
    Drm(String),
    /// The embedded GPU's threads.
    #[error(
        "cannot start the embedded GPU: {0}; check the limits on threads and open files (ulimit -u, ulimit -n)"
    )]
    Soft(std::io::Error),
}

impl Choice {
    /// Reads `soft` or `drm:NODE`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':') {
            Some(("drm", node)) if !node.is_empty() => Some(Self::Drm(node.into())),
            None if text == "soft" => Some(Self::Soft),
            _ => None,
        }
    }

    /// The device file that it opens.
    pub fn node(&self) -> Option<&Path> {
        match self {
            Self::Soft => None,
            Self::Drm(node) => Some(node),
        }
    }

    /// Its driver. `watchdog` is how long a submission may run on the embedded GPU.
    pub fn open(
        &self,
        watchdog: Duration,
        sandbox: Sandbox,
    ) -> Result<Arc<dyn HostDriver>, ChoiceError> {
        match self {
            Self::Drm(node) => {
                let driver = DrmDriver::new(node);
                Ok(Arc::new(
                    driver.map_err(|error| ChoiceError::Drm(error.to_string()))?,
                ))
            }
            Self::Soft => {
                let driver = SoftDriver::new(SoftConfig {
                    watchdog,
                    sandbox,
                    ..SoftConfig::default()
                });
                Ok(Arc::new(driver.map_err(ChoiceError::Soft)?))
            }
        }
    }
}
