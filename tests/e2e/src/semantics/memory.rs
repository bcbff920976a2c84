//! Mappings of a buffer: what `mmap` allows, and what `munmap`, `mremap`, `mprotect` and `fork` make of one.

use std::os::fd::AsFd;

use libc::{MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE};
use pvgpu_protocol::family::core::{GEM_CLOSE, GemClose};

use super::system::{self, Ended, PAGE, map, map_shared, peek, poke, protect, remap, unmap};
use super::{Check, Failure, Gpu, Mapped, pages, word};
use std::time::Duration;

/// The checks, the simplest first.
pub const CHECKS: &[Check] = &[
    Check {
        name: "two mappings of a buffer are one memory",
        run: two_mappings,
        expected: "9 8",
    },
    Check {
        name: "mmap that is private, too long, elsewhere, or of nothing",
        run: refused,
        expected: "EINVAL EINVAL EINVAL EINVAL EINVAL",
    },
    Check {
        name: "munmap of pages in the middle",
        run: partial_unmap,
        expected: "1 2 - - 5 6 7 8, - 2 - - 5 6 - -, mapped again 1 2 3 4 5 6 7 8",
    },
    Check {
        name: "mremap to a shorter, a longer, another place",
        run: moved,
        expected: "1 2 3 4 - - - -, EFAULT, - - - - became 1 2 3 4, EFAULT",
    },
    Check {
        name: "mprotect",
        run: protection,
        expected: "read only EFAULT, writable again ok, mapped read only EFAULT then ok",
    },
    Check {
        name: "a file opened read only",
        run: read_only,
        expected: "writable EACCES, readable ok, mprotect EACCES",
    },
    Check {
        name: "a child's mapping is the parent's",
        run: forked,
        expected: "child Code(0), 77 2 3 4",
    },
    Check {
        name: "a mapping outlives its handle and its file",
        run: outlives,
        expected: "1 2, 5",
    },
    Check {
        name: "msync, and madvise to drop pages",
        run: advice,
        expected: "EINVAL EINVAL",
    },
    Check {
        name: "flags in /proc/self/smaps",
        run: flags,
        expected: "rd wr sh mr mw me ms pf de dd sd",
    },
    Check {
        name: "many mappings, touched page by page",
        run: many,
        expected: "all right",
    },
];

fn two_mappings(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let one = Mapped::new(gpu, 4)?;
    let two = map_shared(one.fd.as_fd(), one.buffer.offset, one.buffer.length)?;
    poke(one.page(2), 9)?;
    poke(two + 3 * PAGE, 8)?;
    let seen = format!("{} {}", peek(two + 2 * PAGE)?, peek(one.page(3))?);
    unmap(two, one.buffer.length)?;
    unmap(one.address, one.buffer.length)?;
    Ok(Some(seen))
}

fn refused(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let buffer = gpu.buffer(fd.as_fd(), 4)?;
    let both = PROT_READ | PROT_WRITE;
    let tries = [
        (buffer.offset, buffer.length, both, MAP_PRIVATE),
        (buffer.offset, buffer.length, PROT_READ, MAP_PRIVATE),
        (buffer.offset, buffer.length + PAGE, both, MAP_SHARED),
        (buffer.offset + (64 << 30), buffer.length, both, MAP_SHARED),
        (0, buffer.length, both, MAP_SHARED),
    ];
    let words = tries.map(|(offset, length, protection, flags)| {
        word(map(fd.as_fd(), offset, length, protection, flags))
    });
    Ok(Some(words.join(" ")))
}

fn partial_unmap(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 8)?;
    unmap(it.page(2), 2 * PAGE)?;
    let middle = pages(it.address, 8);
    unmap(it.page(0), PAGE)?;
    unmap(it.page(6), 2 * PAGE)?;
    let rest = pages(it.address, 8);
    unmap(it.address, 8 * PAGE)?;
    let again = map_shared(it.fd.as_fd(), it.buffer.offset, it.buffer.length)?;
    let seen = format!("{middle}, {rest}, mapped again {}", pages(again, 8));
    unmap(again, it.buffer.length)?;
    Ok(Some(seen))
}

fn moved(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 8)?;
    remap(it.address, 8 * PAGE, 4 * PAGE, None)?;
    let shorter = pages(it.address, 8);
    let longer = word(remap(it.address, 4 * PAGE, 8 * PAGE, None));
    // A place where nothing else is: of a mapping that is gone.
    let target = map_shared(it.fd.as_fd(), it.buffer.offset, it.buffer.length)?;
    unmap(target, it.buffer.length)?;
    let there = remap(it.address, 4 * PAGE, 4 * PAGE, Some(target))?;
    let seen = format!(
        "{shorter}, {longer}, {} became {}, {}",
        pages(it.address, 4),
        pages(there, 4),
        word(remap(there, 0, 4 * PAGE, None))
    );
    unmap(there, 4 * PAGE)?;
    Ok(Some(seen))
}

fn protection(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 2)?;
    protect(it.address, PAGE, PROT_READ)?;
    let read_only = word(poke(it.address, 1));
    protect(it.address, PAGE, PROT_READ | PROT_WRITE)?;
    let writable = word(poke(it.address, 1));
    let other = map(
        it.fd.as_fd(),
        it.buffer.offset,
        it.buffer.length,
        PROT_READ,
        MAP_SHARED,
    )?;
    peek(other)?;
    let before = word(poke(other, 1));
    protect(other, it.buffer.length, PROT_READ | PROT_WRITE)?;
    let seen = format!(
        "read only {read_only}, writable again {writable}, mapped read only {before} then {}",
        word(poke(other, 1))
    );
    unmap(other, it.buffer.length)?;
    unmap(it.address, it.buffer.length)?;
    Ok(Some(seen))
}

fn read_only(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = system::open(&gpu.path, libc::O_RDONLY | libc::O_CLOEXEC)?;
    let buffer = gpu.buffer(fd.as_fd(), 1)?;
    let writable = word(map_shared(fd.as_fd(), buffer.offset, buffer.length));
    let readable = map(
        fd.as_fd(),
        buffer.offset,
        buffer.length,
        PROT_READ,
        MAP_SHARED,
    )?;
    let read = word(peek(readable));
    let seen = format!(
        "writable {writable}, readable {read}, mprotect {}",
        word(protect(readable, buffer.length, PROT_READ | PROT_WRITE))
    );
    unmap(readable, buffer.length)?;
    Ok(Some(seen))
}

fn forked(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 4)?;
    let mut child = system::fork(|| {
        let worked = poke(it.address, 77).and_then(|()| unmap(it.page(1), PAGE));
        i32::from(worked.is_err() || pages(it.address, 4) != "77 - 3 4")
    })?;
    let ended: Ended = child.wait(Duration::from_secs(10))?;
    let seen = format!("child {ended:?}, {}", pages(it.address, 4));
    unmap(it.address, it.buffer.length)?;
    Ok(Some(seen))
}

fn outlives(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let Mapped {
        fd,
        buffer,
        address,
    } = Mapped::new(gpu, 2)?;
    let mut close = GemClose {
        handle: buffer.handle,
        pad: 0,
    };
    system::ioctl(fd.as_fd(), GEM_CLOSE, &mut close)?;
    let without_handle = pages(address, 2);
    drop(fd);
    poke(address, 5)?;
    let seen = format!("{without_handle}, {}", peek(address)?);
    unmap(address, buffer.length)?;
    Ok(Some(seen))
}

fn advice(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 2)?;
    let seen = format!(
        "{} {}",
        word(system::sync(it.address, it.buffer.length)),
        word(system::advise(
            it.address,
            it.buffer.length,
            libc::MADV_DONTNEED
        ))
    );
    unmap(it.address, it.buffer.length)?;
    Ok(Some(seen))
}

fn flags(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 2)?;
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let flags = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&format!("{:x}-", it.address)))
        .find_map(|line| line.strip_prefix("VmFlags:"))
        .ok_or("the mapping is not in /proc/self/smaps")?;
    let seen = flags.split_whitespace().collect::<Vec<_>>().join(" ");
    unmap(it.address, it.buffer.length)?;
    Ok(Some(seen))
}

/// Also more pages than a page table has.
fn many(gpu: &Gpu) -> Result<Option<String>, Failure> {
    const PAGES: usize = 700;
    let it = Mapped::new(gpu, PAGES)?;
    for round in 0..20 {
        let again = map_shared(it.fd.as_fd(), it.buffer.offset, it.buffer.length)?;
        for page in (round..PAGES).step_by(37) {
            let byte = peek(again + page * PAGE)?;
            if byte != (page + 1) as u8 {
                return Err(format!("page {page} starts with {byte}").into());
            }
        }
        unmap(again, it.buffer.length)?;
    }
    unmap(it.address, it.buffer.length)?;
    Ok(Some("all right".to_owned()))
}
