//! Error numbers that cross the boundary, with the values of Linux (`asm-generic/errno.h`).
//!
//! Used by both sides. A response carries `-errno`; nothing else of an error travels.

use core::fmt;

/// A Linux error number: positive, at most 4095 (`MAX_ERRNO` of the kernel).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident = $number:literal: $meaning:literal,)*) => {
        impl Errno {
            $(#[doc = $meaning] pub const $name: Self = Self($number);)*

            /// The symbolic name, `None` for a number that pvgpu itself never uses.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1: "Operation not permitted.",
    ENOENT = 2: "No such object.",
    EINTR = 4: "Interrupted: the request was cancelled.",
    EIO = 5: "The host GPU failed.",
    EBADF = 9: "No such file or object in this session.",
    EAGAIN = 11: "Try again: a limit on concurrent use is reached, or nothing is ready.",
    ENOMEM = 12: "Out of memory, or the guest's memory limit is reached.",
    EACCES = 13: "Permission denied.",
    EFAULT = 14: "Bad address.",
    EBUSY = 16: "Busy.",
    ENODEV = 19: "The device is gone.",
    EINVAL = 22: "Invalid argument.",
    EMFILE = 24: "Too many open files.",
    ENOTTY = 25: "No such ioctl on this device.",
    ENOSPC = 28: "No space in the aperture.",
    ESPIPE = 29: "That object has no size.",
    EDOM = 33: "Argument out of domain.",
    ENOSYS = 38: "No such operation.",
    ETIME = 62: "Timer expired.",
    EPROTO = 71: "Protocol violation.",
    EOVERFLOW = 75: "Value too large.",
    EOPNOTSUPP = 95: "Not supported by this host.",
    ENOTCONN = 107: "No session: no hello was said yet, or the session is lost.",
    ETIMEDOUT = 110: "Timed out.",
    ECANCELED = 125: "The GPU was reset and dropped this work.",
    E2BIG = 7: "Argument list too long.",
}

impl Errno {
    /// The largest error number (`MAX_ERRNO` in the kernel's `include/linux/err.h`).
    pub const MAX: i32 = 4095;

    /// An error number from the host, `EIO` when it is not one.
    pub const fn new(number: i32) -> Self {
        if number > 0 && number <= Self::MAX {
            Self(number)
        } else {
            Self::EIO
        }
    }

    /// The positive number.
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl core::error::Error for Errno {}
