//! A submission to `virtio_gpu` for tests that change it while the host reads it, in one process and from a second vCPU. It is
//! to reach a host driver that only looks at it: its commands are none.

use alloc::vec::Vec;

use pvgpu_protocol::family::virtio_gpu::{Execbuffer, OutSyncobj, exec};
use zerocopy::IntoBytes;

/// Bytes of its commands.
pub const COMMANDS: usize = 32;

/// The payload of `EXECBUFFER` with every kind of field: flags, counts, handles (buffer 1 twice), a struct in an array
/// (syncobj 2), a choice, opaque bytes. The argument comes first, then commands, handles and syncobj.
pub fn submission() -> Vec<u8> {
    let argument = Execbuffer {
        flags: exec::RING_IDX,
        size: COMMANDS as u32,
        command: 1,
        bo_handles: 1,
        num_bo_handles: 2,
        ring_idx: 5,
        syncobj_stride: 16,
        num_out_syncobjs: 1,
        out_syncobjs: 1,
        ..Default::default()
    };
    let handles = [1u32, 1];
    let point = OutSyncobj {
        handle: 2,
        flags: 0,
        point: 7,
    };
    [
        argument.as_bytes(),
        &[0x11; COMMANDS],
        handles.as_bytes(),
        point.as_bytes(),
    ]
    .concat()
}
