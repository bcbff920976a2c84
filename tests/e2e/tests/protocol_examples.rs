//! The examples of `docs/protocol.md` are what the code sends and receives, and its tables what the code defines.
//!
//! A guest driver talks to a session of the proxy through a channel that records every message. Each message is split
//! into labeled fields and must stand in the document exactly so. `PVGPU_WRITE_DOCS=1` puts it there.

use pvgpu_e2e::loopback::Loopback;
use pvgpu_guest_driver::channel::{Channel, Slot};
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{ObjectId, Session};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity, Mapping};
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::at;
use pvgpu_protocol::family::core;
use pvgpu_protocol::family::virtio_gpu::{self as gpu, GetParam, exec};
use pvgpu_protocol::wire::{self, Operation, PageRange, RequestHeader, ResponseHeader, open};
use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// A host driver with the answers of the examples.
struct Example(Identity);

struct Object;

/// Handles: of a resource of one page, and of a larger one.
const UNMAPPABLE: u32 = 1;
const MAPPABLE: u32 = 2;

impl HostDriver for Example {
    fn identity(&self) -> &Identity {
        &self.0
    }

    fn open(&self, _flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Ok(Arc::new(Object))
    }
}

impl HostObject for Object {
    fn ioctl(&self, call: &mut Call, _cancel: &Cancel) -> Result<i32, Errno> {
        match call.command() {
            gpu::GETPARAM => {
                let value = at!(GetParam.value);
                call.array_mut(value).copy_from_slice(&1u32.to_le_bytes());
            }
            gpu::RESOURCE_CREATE => {
                let mut create: gpu::ResourceCreate = call.read_argument();
                let large = create.size > 4096;
                let handle = if large { MAPPABLE } else { UNMAPPABLE };
                (create.bo_handle, create.res_handle) = (handle, 7);
                call.write_argument(&create);
            }
            core::SYNCOBJ_CREATE => {
                let mut create: core::SyncobjCreate = call.read_argument();
                create.handle = 1;
                call.write_argument(&create);
            }
            gpu::EXECBUFFER => {
                let out: Vec<_> = call.fds_out().collect();
                for field in out {
                    call.put_object(field, Arc::new(Object));
                }
            }
            gpu::MAP => {
                let mut map: gpu::Map = call.read_argument();
                if map.handle == UNMAPPABLE {
                    return Err(Errno::EINVAL);
                }
                map.offset = 0x1000_0000;
                call.write_argument(&map);
            }
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }

    fn mapping(&self, offset: u64, length: u64, _protection: u32) -> Result<Mapping, Errno> {
        let file = tempfile::tempfile().map_err(|_| Errno::ENOMEM)?;
        file.set_len(offset + length).map_err(|_| Errno::ENOMEM)?;
        Ok(Mapping {
            fd: file.into(),
            offset,
        })
    }

    fn poll(&self, events: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        Ok(events)
    }
}

/// A channel that records the last message.
struct Tap {
    inner: Loopback,
    request: Vec<u8>,
    response: Vec<u8>,
}

impl Channel for Tap {
    fn max_message(&self) -> usize {
        self.inner.max_message()
    }
    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno> {
        self.inner.begin(request, response)
    }
    fn request(&mut self, slot: &Slot) -> &mut [u8] {
        self.inner.request(slot)
    }
    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno> {
        self.request = self.inner.request(slot)[..length].to_vec();
        self.inner.submit(slot, length)
    }
    fn doorbell(&mut self) {
        self.inner.doorbell();
    }
    fn is_complete(&mut self, slot: &Slot) -> bool {
        self.inner.is_complete(slot)
    }
    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        self.inner.wait(slot)
    }
    fn response(&self, slot: &Slot) -> &[u8] {
        self.inner.response(slot)
    }
    fn end(&mut self, slot: Slot) {
        self.response = self.inner.response(&slot).to_vec();
        self.inner.end(slot);
    }
    fn now_ns(&self) -> u64 {
        self.inner.now_ns()
    }
}

/// A field of a message: its length in bytes and what it is.
type Part = (usize, &'static str);

const REQUEST: &[Part] = &[(2, "operation"), (2, "flags"), (4, "object"), (8, "id")];
const RESPONSE: &[Part] = &[(8, "id"), (4, "result"), (4, "length of the payload")];

/// The bytes of a message, one field per line, at most 16 bytes per line.
fn dump(title: &str, bytes: &[u8], parts: &[&[Part]]) -> String {
    let mut text = format!("{title}, {} bytes\n", bytes.len());
    let mut offset = 0;
    for (length, label) in parts.concat() {
        let field = &bytes[offset..offset + length];
        for (chunk, label) in field
            .chunks(16)
            .zip(std::iter::once(label).chain(std::iter::repeat("")))
        {
            let hex: Vec<_> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
            let line = format!("  {offset:3}  {:47}  {label}", hex.join(" "));
            writeln!(text, "{}", line.trim_end()).unwrap();
            offset += chunk.len();
        }
    }
    assert_eq!(offset, bytes.len(), "{title}: bytes without a label");
    text
}

/// The examples in the order of the document.
fn examples() -> Vec<(&'static str, String)> {
    let identity = Identity {
        name: "virtio_gpu".into(),
        version: [0, 1, 0],
        date: "0".into(),
        description: "virtio GPU".into(),
    };
    let driver = Arc::new(Example(identity));
    let aperture = Arc::new(Aperture::reserve(256 << 20).unwrap());
    let host = HostSession::new(driver.clone(), Some(aperture), Limits::default());
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = GuestMemoryAtomic::new(memory);
    let without = HostSession::without_aperture(driver, memory, Limits::default(), None).unwrap();
    let connect = |host| {
        let tap = Tap {
            inner: Loopback::new(host),
            request: Vec::new(),
            response: Vec::new(),
        };
        Session::connect(tap, "example").unwrap()
    };
    let mut examples = Vec::new();
    let mut session = connect(host);
    let mut add = |name, session: &mut Session<Tap>, request: &[Part], response: &[Part]| {
        let tap = session.channel();
        let text = [
            dump("request", &tap.request, &[REQUEST, request]),
            dump("response", &tap.response, &[RESPONSE, response]),
        ];
        examples.push((name, text.concat()));
    };
    add(
        "hello",
        &mut session,
        &[
            (1, "version_min = 1"),
            (1, "version_max = 1"),
            (1, "features = map_pages"),
            (1, "guest: 7 bytes"),
            (7, "\"example\""),
        ],
        &[
            (1, "version = 1"),
            (1, "features = 0"),
            (5, "limits.message = 0x400000"),
            (3, "limits.objects = 1024"),
            (3, "limits.in_flight = 256"),
            (9, "limits.mapped = 0x1_0000_0000"),
            (9, "limits.memory = 0x1_0000_0000"),
            (5, "limits.handles = 65536"),
            (5, "aperture = 0x10000000"),
            (1, "driver.name: 10 bytes"),
            (10, "\"virtio_gpu\""),
            (3, "driver.version = 0, 1, 0 (zigzag)"),
            (1, "driver.date: 1 byte"),
            (1, "\"0\""),
            (1, "driver.description: 10 bytes"),
            (10, "\"virtio GPU\""),
        ],
    );

    let file = session.open(open::RDWR).unwrap();
    add(
        "open",
        &mut session,
        &[(4, "flags = O_RDWR"), (4, "reserved")],
        &[],
    );

    #[allow(unsafe_code)]
    // SAFETY: every argument in this function is a live local with pointers to live locals, or null.
    let mut caller = unsafe { Flat::new() };
    let mut value = 0u32;
    let mut getparam = GetParam {
        param: gpu::param::FEATURES_3D,
        value: &raw mut value as u64,
    };
    let address = &raw mut getparam as u64;
    let result = session.ioctl(file, gpu::GETPARAM, address, &mut caller);
    assert_eq!((result, value), (Ok(0), 1));
    const IOCTL: [Part; 2] = [(4, "command"), (4, "reserved")];
    let getparam_fields = [
        (8, "param = VIRTGPU_PARAM_3D_FEATURES"),
        (8, "value: a pointer"),
    ];
    add(
        "getparam",
        &mut session,
        &[&IOCTL[..], &getparam_fields, &[(4, "*value")]].concat(),
        &[&getparam_fields[..], &[(4, "*value = 1")]].concat(),
    );

    let mut create = gpu::ResourceCreate {
        target: 2,
        format: 1,
        bind: 2,
        width: 32,
        height: 32,
        depth: 1,
        array_size: 1,
        size: 4096,
        ..Default::default()
    };
    let address = &raw mut create as u64;
    let result = session.ioctl(file, gpu::RESOURCE_CREATE, address, &mut caller);
    assert_eq!((result, create.bo_handle), (Ok(0), 1));
    let mut syncobj = core::SyncobjCreate::default();
    let address = &raw mut syncobj as u64;
    let result = session.ioctl(file, core::SYNCOBJ_CREATE, address, &mut caller);
    assert_eq!((result, syncobj.handle), (Ok(0), 1));

    let commands = [0x0000_0001u32, 0x0000_0002, 0x0000_0003];
    let buffers = [create.bo_handle];
    let signaled = gpu::OutSyncobj {
        handle: syncobj.handle,
        flags: 0,
        point: 0,
    };
    let mut submit = gpu::Execbuffer {
        flags: exec::FENCE_FD_OUT,
        size: 12,
        command: commands.as_ptr() as u64,
        bo_handles: buffers.as_ptr() as u64,
        num_bo_handles: 1,
        fence_fd: -1,
        syncobj_stride: 16,
        num_out_syncobjs: 1,
        out_syncobjs: &raw const signaled as u64,
        ..Default::default()
    };
    let address = &raw mut submit as u64;
    let result = session.ioctl(file, gpu::EXECBUFFER, address, &mut caller);
    assert_eq!((result, submit.fence_fd), (Ok(0), 2));
    let argument = |fence| {
        [
            (4, "flags = VIRTGPU_EXECBUF_FENCE_FD_OUT"),
            (4, "size = 12"),
            (8, "command: a pointer"),
            (8, "bo_handles: a pointer"),
            (4, "num_bo_handles = 1"),
            (4, fence),
            (4, "ring_idx"),
            (4, "syncobj_stride = 16"),
            (4, "num_in_syncobjs = 0"),
            (4, "num_out_syncobjs = 1"),
            (8, "in_syncobjs: null"),
            (8, "out_syncobjs: a pointer"),
        ]
    };
    let arrays = [
        (12, "*command"),
        (4, "padding"),
        (4, "*bo_handles: handle 1"),
        (4, "padding"),
        (4, "*out_syncobjs: handle 1"),
        (4, "flags"),
        (8, "point"),
    ];
    add(
        "execbuffer",
        &mut session,
        &[&IOCTL[..], &argument("fence_fd: goes out only"), &arrays].concat(),
        &argument("fence_fd: object 2"),
    );

    assert_eq!(session.poll(ObjectId(2), 1, 1_000_000_000), Ok(1));
    add(
        "poll",
        &mut session,
        &[
            (4, "events = POLLIN"),
            (4, "reserved"),
            (8, "timeout_ns = 1 second"),
        ],
        &[],
    );

    let mapping = session.map(file, 0x1000_0000, 4096, 3).unwrap();
    add(
        "map",
        &mut session,
        &[
            (8, "offset"),
            (8, "length = 4096"),
            (4, "protection = PROT_READ | PROT_WRITE"),
            (4, "reserved"),
        ],
        &[(8, "aperture_offset = 0"), (8, "length = 4096")],
    );
    session.unmap(mapping).unwrap();
    add(
        "unmap",
        &mut session,
        &[(8, "aperture_offset = 0"), (8, "length = 4096")],
        &[],
    );

    let mut other = connect(without);
    let other_file = other.open(open::RDWR).unwrap();
    create.size = 2 * 4096;
    let address = &raw mut create as u64;
    let result = other.ioctl(other_file, gpu::RESOURCE_CREATE, address, &mut caller);
    assert_eq!((result, create.bo_handle), (Ok(0), MAPPABLE));
    let mut map = gpu::Map {
        handle: MAPPABLE,
        ..Default::default()
    };
    let address = &raw mut map as u64;
    let result = other.ioctl(other_file, gpu::MAP, address, &mut caller);
    assert_eq!((result, map.offset), (Ok(0), 0x1000_0000));
    let ranges = [0x1_2000u64, 0x4_0000].map(|address| PageRange {
        address: address.into(),
        length: 4096.into(),
    });
    other
        .map_pages(other_file, map.offset, 2 * 4096, 3, &ranges)
        .unwrap();
    add(
        "map_pages",
        &mut other,
        &[
            (8, "offset"),
            (8, "length = 8192"),
            (4, "protection = PROT_READ | PROT_WRITE"),
            (4, "ranges = 2"),
            (8, "address"),
            (8, "length = 4096"),
            (8, "address"),
            (8, "length = 4096"),
        ],
        &[(8, "aperture_offset: mapping 1"), (8, "length = 8192")],
    );

    let map_fields = [(8, "offset"), (4, "handle = 1"), (4, "pad")];
    let mut map = gpu::Map {
        handle: 1,
        ..Default::default()
    };
    let address = &raw mut map as u64;
    let result = session.ioctl(file, gpu::MAP, address, &mut caller);
    assert_eq!(result, Err(Errno::EINVAL));
    add(
        "failed",
        &mut session,
        &[&IOCTL[..], &map_fields].concat(),
        &map_fields,
    );
    let mut unknown = gpu::Map {
        handle: 9,
        ..Default::default()
    };
    let address = &raw mut unknown as u64;
    let result = session.ioctl(file, gpu::MAP, address, &mut caller);
    assert_eq!(result, Err(Errno::ENOENT));
    let map_fields = [(8, "offset"), (4, "handle = 9"), (4, "pad")];
    add(
        "rejected",
        &mut session,
        &[&IOCTL[..], &map_fields].concat(),
        &[],
    );

    assert_eq!(session.cancel(5), Err(Errno::ENOENT));
    add("cancel", &mut session, &[(8, "id of the request")], &[]);
    session.close(file).unwrap();
    add("close", &mut session, &[], &[]);
    examples
}

fn document() -> (PathBuf, String) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol.md");
    let text = std::fs::read_to_string(&path).expect("docs/protocol.md is there");
    (path, text)
}

/// The text between the example's marker with its fence and the end of that.
fn place(document: &str, name: &str) -> Option<std::ops::Range<usize>> {
    let marker = format!("<!-- example: {name} -->\n```text\n");
    let start = document.find(&marker)? + marker.len();
    let length = document[start..].find("```")?;
    Some(start..start + length)
}

#[test]
fn the_examples_of_the_protocol_are_what_the_code_sends_and_receives() {
    let (path, mut document) = document();
    let write = std::env::var_os("PVGPU_WRITE_DOCS").is_some();
    let mut wrong = Vec::new();
    for (name, example) in examples() {
        let Some(place) = place(&document, name) else {
            panic!("docs/protocol.md has no example {name}; it would be:\n{example}");
        };
        if document[place.clone()] != example {
            wrong.push(format!("{name}:\n{example}"));
            document.replace_range(place, &example);
        }
    }
    if write {
        std::fs::write(path, document).unwrap();
    } else {
        assert!(
            wrong.is_empty(),
            "docs/protocol.md differs; run this test with PVGPU_WRITE_DOCS=1 if the code is right:\n{}",
            wrong.concat()
        );
    }
}

#[test]
fn no_example_of_the_protocol_is_there_that_nothing_checks() {
    let (_, document) = document();
    let checked: Vec<_> = examples().into_iter().map(|(name, _)| name).collect();
    let there = document
        .lines()
        .filter_map(|line| line.strip_prefix("<!-- example: ")?.strip_suffix(" -->"));
    assert_eq!(there.collect::<Vec<_>>(), checked);
}

#[test]
fn the_document_names_every_operation_and_errno_with_its_number() {
    let (_, document) = document();
    let rows: HashMap<&str, &str> = document
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            Some((cells.next()?, cells.next()?))
        })
        .collect();
    for operation in (0..).map_while(Operation::from_number) {
        let name = format!("`{}`", operation.name());
        let number = operation.number().to_string();
        assert_eq!(rows.get(name.as_str()), Some(&number.as_str()), "{name}");
    }
    for errno in (1..=Errno::MAX).map(Errno::new) {
        let Some(name) = errno.name() else { continue };
        let (name, number) = (format!("`{name}`"), errno.number().to_string());
        assert_eq!(rows.get(name.as_str()), Some(&number.as_str()), "{name}");
    }
}

#[test]
fn the_document_gives_every_fixed_record_its_size() {
    let (_, document) = document();
    for (name, size) in [
        ("Configuration space", size_of::<wire::ConfigSpace>()),
        ("Request header", size_of::<RequestHeader>()),
        ("Response header", size_of::<ResponseHeader>()),
        ("Body of `open`", size_of::<wire::OpenRequest>()),
        ("Body of `ioctl`", size_of::<wire::IoctlRequest>()),
        ("Body of `map`", size_of::<wire::MapRequest>()),
        ("Body of `map_pages`", size_of::<wire::MapPagesRequest>()),
        (
            "Payload of the answer to `map`",
            size_of::<wire::MapResponse>(),
        ),
        ("Body of `unmap`", size_of::<wire::UnmapRequest>()),
        ("Body of `poll`", size_of::<wire::PollRequest>()),
        ("Body of `read`", size_of::<wire::ReadRequest>()),
        ("Body of `cancel`", size_of::<wire::CancelRequest>()),
        ("Body of `watch`", size_of::<wire::WatchRequest>()),
        (
            "Payload of the answer to `size`",
            size_of::<wire::SizeResponse>(),
        ),
    ] {
        let title = format!("{name}, {size} bytes:");
        assert!(
            document.contains(&title),
            "docs/protocol.md lacks {title:?}"
        );
    }
}
