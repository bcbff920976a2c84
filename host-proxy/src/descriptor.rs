//! One descriptor chain: the request is copied out of it once, the response written into it.
//!
//! Used by [`crate::device`]. Nothing here keeps a reference into guest memory, and no byte is read twice.

use std::ops::Deref;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Where a response goes.
pub(crate) struct Writable {
    head: u16,
    buffers: Vec<(GuestAddress, usize)>,
    length: usize,
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// More bytes than the limit on messages.
    TooLong,
    /// A buffer outside of guest memory, or a readable buffer behind a writable one.
    Broken,
}

/// Copies the chain's readable bytes to the start of `buffer`, at most `limit` of them, and returns how many. What lies
/// behind them is of earlier requests: the buffer only grows, since clearing it costs as much as the copy.
pub(crate) fn copy_in<M>(
    chain: DescriptorChain<M>,
    buffer: &mut Vec<u8>,
    limit: usize,
) -> Result<(Writable, usize), (u16, Malformed)>
where
    M: Deref<Target: GuestMemory> + Clone,
{
    let head = chain.head_index();
    let mut writable = Writable {
        head,
        buffers: Vec::with_capacity(1),
        length: 0,
    };
    let mut copied = 0;
    let memory = chain.clone();
    for descriptor in chain {
        let length = usize::try_from(descriptor.len()).map_err(|_| (head, Malformed::TooLong))?;
        if descriptor.is_write_only() {
            writable.buffers.push((descriptor.addr(), length));
            writable.length = writable.length.saturating_add(length);
            continue;
        }
        if !writable.buffers.is_empty() {
            return Err((head, Malformed::Broken));
        }
        if length > limit.saturating_sub(copied) {
            return Err((head, Malformed::TooLong));
        }
        let range = copied..copied + length;
        if buffer.len() < range.end {
            buffer.resize(range.end, 0);
        }
        copied = range.end;
        let target = buffer.get_mut(range).unwrap_or_default();
        memory
            .memory()
            .read_slice(target, descriptor.addr())
            .map_err(|_| (head, Malformed::Broken))?;
    }
    Ok((writable, copied))
}

impl Writable {
    /// The chain's head, which names it in the used ring.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that a response may take.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Writes `bytes` at `offset` of the writable bytes. What does not fit or has no memory behind it is lost: the
    /// guest named that place itself.
    pub(crate) fn write(
        &self,
        memory: &impl GuestMemory,
        mut offset: usize,
        mut bytes: &[u8],
    ) -> Result<(), Malformed> {
        for &(address, length) in &self.buffers {
            if offset >= length {
                offset -= length;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(length - offset));
            let place = address
                .0
                .checked_add(offset as u64)
                .ok_or(Malformed::Broken)?;
            memory
                .write_slice(now, GuestAddress(place))
                .map_err(|_| Malformed::Broken)?;
            (offset, bytes) = (0, later);
            if bytes.is_empty() {
                return Ok(());
            }
        }
        if bytes.is_empty() {
            Ok(())
        } else {
            Err(Malformed::TooLong)
        }
    }
}
