//! A caller in the driver's own address space: a bare-metal guest's program, or a test.
//!
//! Its pointers are addresses that this code can use, and a file descriptor is the id of the object itself.

#![allow(unsafe_code)]

use crate::marshal::Caller;
use pvgpu_protocol::Errno;
use pvgpu_protocol::schema::Descriptor;

/// The memory of this very program.
pub struct Flat(());

impl Flat {
    /// Lets ioctls read and write the memory of this program through the addresses in their arguments.
    ///
    /// # Safety
    ///
    /// For as long as an ioctl with this caller is not finished, every address in its argument, and in what that
    /// reaches, must be valid for reads and writes of as many bytes as the ioctl's schema says, or null.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

fn pointer(address: u64) -> Result<*mut u8, Errno> {
    match usize::try_from(address) {
        Ok(0) | Err(_) => Err(Errno::EFAULT),
        Ok(address) => Ok(core::ptr::with_exposed_provenance_mut(address)),
    }
}

impl Caller for Flat {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let source = pointer(address)?;
        // SAFETY: the promise of `Flat::new` makes the source valid; `bytes` is the driver's own buffer.
        unsafe { core::ptr::copy(source, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let target = pointer(address)?;
        // SAFETY: the promise of `Flat::new` makes the target valid; `bytes` is the driver's own buffer.
        unsafe { core::ptr::copy(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    fn object(&self, fd: i32, _: Descriptor) -> Result<i32, Errno> {
        Ok(fd)
    }

    fn fd(&mut self, object: i32, _: Descriptor, _: u32) -> Result<i32, Errno> {
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_program_go_both_ways_and_a_null_address_is_a_fault() {
        let mut memory = *b"program";
        let address = memory.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: every address below is null or within `memory`, which lives longer.
        let mut program = unsafe { Flat::new() };
        let mut read = [0; 4];
        program.read(address + 3, &mut read).unwrap();
        assert_eq!(&read, b"gram");
        program.write(address, b"PRO").unwrap();
        assert_eq!(program.read(0, &mut read), Err(Errno::EFAULT));
        assert_eq!(program.write(0, b"x"), Err(Errno::EFAULT));
        assert_eq!(&memory, b"PROgram");
    }
}
