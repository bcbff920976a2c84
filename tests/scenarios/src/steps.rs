//! Calls on a device file that are timed, reported, and checked. Scenarios make their calls through [`Steps`], so that
//! every failure says which step it was.

use alloc::format;
use alloc::string::String;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{VERSION, Version};
use zerocopy::{FromBytes, IntoBytes};

use crate::DeviceFile;

/// Why a scenario did not end with a picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A call failed.
    #[error("{step}: {errno}")]
    Call {
        /// Which one.
        step: &'static str,
        /// How.
        errno: Errno,
    },
    /// A call succeeded, but what it gave is wrong.
    #[error("{0}")]
    Wrong(String),
}

/// Who is told of each step.
pub trait Report {
    /// The step of that name has succeeded and took so many nanoseconds.
    fn step(&mut self, name: &'static str, nanoseconds: u64);
}

impl<F: FnMut(&'static str, u64)> Report for F {
    fn step(&mut self, name: &'static str, nanoseconds: u64) {
        self(name, nanoseconds);
    }
}

/// A device file whose calls are reported.
pub struct Steps<'a, D, R> {
    /// The file.
    pub file: &'a mut D,
    /// Who is told.
    pub report: &'a mut R,
}

impl<D: DeviceFile, R: Report> Steps<'_, D, R> {
    /// Does something with the file as the step of that name.
    pub fn call<T>(
        &mut self,
        step: &'static str,
        action: impl FnOnce(&mut D) -> Result<T, Errno>,
    ) -> Result<T, Failure> {
        let started = self.file.now_ns();
        let result = action(self.file).map_err(|errno| Failure::Call { step, errno })?;
        let nanoseconds = self.file.now_ns().saturating_sub(started);
        self.report.step(step, nanoseconds);
        Ok(result)
    }

    /// Issues an ioctl as the step of that name and gives the argument as the driver left it.
    pub fn ioctl<T: FromBytes + IntoBytes>(
        &mut self,
        step: &'static str,
        command: u32,
        mut argument: T,
    ) -> Result<T, Failure> {
        self.call(step, |file| file.ioctl(command, &mut argument))?;
        Ok(argument)
    }

    /// Maps memory as the step of that name.
    pub fn map(
        &mut self,
        step: &'static str,
        offset: u64,
        length: usize,
    ) -> Result<D::Mapping, Failure> {
        self.call(step, |file| file.map(offset, length))
    }

    /// Issues an ioctl that must fail, and with that errno.
    pub fn refused<T: FromBytes + IntoBytes>(
        &mut self,
        step: &'static str,
        command: u32,
        mut argument: T,
        expected: Errno,
    ) -> Result<(), Failure> {
        let started = self.file.now_ns();
        match self.file.ioctl(command, &mut argument) {
            Err(errno) if errno == expected => {
                let nanoseconds = self.file.now_ns().saturating_sub(started);
                self.report.step(step, nanoseconds);
                Ok(())
            }
            Err(errno) => Err(Failure::Wrong(format!("{step}: {errno}, not {expected}"))),
            Ok(_) => Err(Failure::Wrong(format!(
                "{step}: succeeded, but must fail with {expected}"
            ))),
        }
    }
}

/// Fails the scenario with a formatted reason unless `condition` holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::Failure::Wrong(alloc::format!($($reason)+)));
        }
    };
}

/// The name of the device's driver, and its length in bytes.
pub fn driver_name<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
) -> Result<([u8; 32], usize), Failure> {
    let mut name = [0; 32];
    let version = steps.ioctl(
        "VERSION",
        VERSION,
        Version {
            name_len: name.len() as u64,
            name: address_mut(&mut name),
            ..Default::default()
        },
    )?;
    let length = name.len().min(version.name_len as usize);
    Ok((name, length))
}

/// Fails unless the device's driver has that name.
pub fn expect_driver<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    driver: &[u8],
) -> Result<(), Failure> {
    let (name, length) = driver_name(steps)?;
    check!(
        &name[..length] == driver,
        "the driver is {}, not {}: open a node of that driver",
        name[..length].escape_ascii(),
        driver.escape_ascii()
    );
    Ok(())
}

/// The address of `bytes` as a pointer field of an ioctl argument holds it.
pub fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}

/// The address of memory that an ioctl writes to.
pub fn address_mut(bytes: &mut [u8]) -> u64 {
    bytes.as_mut_ptr().expose_provenance() as u64
}
