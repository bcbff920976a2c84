//! Compares the tables with the kernel's own headers: a C file made from them, full of `_Static_assert`, must compile.
//!
//! The headers come from Debian's packages of Linux 6.12 (newest forms) and Linux 6.1 (older forms). Without them, or
//! without a C compiler, the tests fail and name what to install. A family without a header is ours alone and has
//! nothing to be compared with.

use pvgpu_protocol::family::{self, Family, core, vgem, virtio_gpu};
use pvgpu_protocol::schema::{Element, Ioctl, Kind, Struct, command};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One kernel's uAPI.
struct Kernel {
    /// Version, as the package's folder name has it.
    version: &'static str,
    /// Debian's packages that bring the headers; one is enough.
    package: &'static str,
    /// Ioctls that it does not have yet.
    absent: &'static [&'static str],
    /// Ioctls whose arguments are older and shorter there, with their sizes.
    older: &'static [(&'static str, u16)],
    /// Structs that it does not have yet.
    absent_structs: &'static [&'static str],
    /// Fields that had another name: struct, name now, name there.
    renamed: &'static [(&'static str, &'static str, &'static str)],
    /// Constants that it does not have yet.
    absent_constants: &'static [&'static str],
}

/// The one that the tables are written from.
const NEWEST: Kernel = Kernel {
    version: "6.12.",
    package: "linux-headers-6.12.*-common",
    absent: &[],
    older: &[],
    absent_structs: &[],
    renamed: &[],
    absent_constants: &[],
};

/// The oldest one that is supported.
const OLDER: Kernel = Kernel {
    version: "6.1.",
    package: "linux-headers-6.1.*-common",
    absent: &["DRM_IOCTL_SYNCOBJ_EVENTFD"],
    older: &[
        ("DRM_IOCTL_SYNCOBJ_WAIT", 32),
        ("DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT", 40),
        ("DRM_IOCTL_VIRTGPU_EXECBUFFER", 40),
    ],
    absent_structs: &["drm_virtgpu_execbuffer_syncobj"],
    renamed: &[("drm_virtgpu_execbuffer", "syncobj_stride", "pad")],
    absent_constants: &[
        "DRM_SYNCOBJ_WAIT_FLAGS_WAIT_DEADLINE",
        "VIRTGPU_EXECBUF_SYNCOBJ_RESET",
        "VIRTGPU_PARAM_EXPLICIT_DEBUG_NAME",
        "VIRTGPU_CONTEXT_PARAM_DEBUG_NAME",
    ],
};

/// The constants beside the tables, by their names in the headers.
const CONSTANTS: &[(&str, u64)] = &[
    ("DRM_CAP_DUMB_BUFFER", core::cap::DUMB_BUFFER),
    ("DRM_CAP_PRIME", core::cap::PRIME),
    (
        "DRM_CAP_TIMESTAMP_MONOTONIC",
        core::cap::TIMESTAMP_MONOTONIC,
    ),
    ("DRM_CAP_SYNCOBJ", core::cap::SYNCOBJ),
    ("DRM_CAP_SYNCOBJ_TIMELINE", core::cap::SYNCOBJ_TIMELINE),
    ("DRM_CLOEXEC", core::prime::CLOEXEC as u64),
    ("DRM_RDWR", core::prime::RDWR as u64),
    (
        "DRM_SYNCOBJ_CREATE_SIGNALED",
        core::syncobj::CREATE_SIGNALED as u64,
    ),
    (
        "DRM_SYNCOBJ_HANDLE_TO_FD_FLAGS_EXPORT_SYNC_FILE",
        core::syncobj::EXPORT_SYNC_FILE as u64,
    ),
    (
        "DRM_SYNCOBJ_FD_TO_HANDLE_FLAGS_IMPORT_SYNC_FILE",
        core::syncobj::IMPORT_SYNC_FILE as u64,
    ),
    (
        "DRM_SYNCOBJ_WAIT_FLAGS_WAIT_ALL",
        core::syncobj::WAIT_ALL as u64,
    ),
    (
        "DRM_SYNCOBJ_WAIT_FLAGS_WAIT_FOR_SUBMIT",
        core::syncobj::WAIT_FOR_SUBMIT as u64,
    ),
    (
        "DRM_SYNCOBJ_WAIT_FLAGS_WAIT_AVAILABLE",
        core::syncobj::WAIT_AVAILABLE as u64,
    ),
    (
        "DRM_SYNCOBJ_WAIT_FLAGS_WAIT_DEADLINE",
        core::syncobj::WAIT_DEADLINE as u64,
    ),
    (
        "DRM_SYNCOBJ_QUERY_FLAGS_LAST_SUBMITTED",
        core::syncobj::QUERY_LAST_SUBMITTED as u64,
    ),
    ("VGEM_FENCE_WRITE", vgem::FENCE_WRITE as u64),
    ("VIRTGPU_PARAM_3D_FEATURES", virtio_gpu::param::FEATURES_3D),
    (
        "VIRTGPU_PARAM_CAPSET_QUERY_FIX",
        virtio_gpu::param::CAPSET_QUERY_FIX,
    ),
    (
        "VIRTGPU_PARAM_RESOURCE_BLOB",
        virtio_gpu::param::RESOURCE_BLOB,
    ),
    (
        "VIRTGPU_PARAM_HOST_VISIBLE",
        virtio_gpu::param::HOST_VISIBLE,
    ),
    (
        "VIRTGPU_PARAM_CROSS_DEVICE",
        virtio_gpu::param::CROSS_DEVICE,
    ),
    (
        "VIRTGPU_PARAM_CONTEXT_INIT",
        virtio_gpu::param::CONTEXT_INIT,
    ),
    (
        "VIRTGPU_PARAM_SUPPORTED_CAPSET_IDs",
        virtio_gpu::param::SUPPORTED_CAPSET_IDS,
    ),
    (
        "VIRTGPU_PARAM_EXPLICIT_DEBUG_NAME",
        virtio_gpu::param::EXPLICIT_DEBUG_NAME,
    ),
    (
        "VIRTGPU_EXECBUF_FENCE_FD_IN",
        virtio_gpu::exec::FENCE_FD_IN as u64,
    ),
    (
        "VIRTGPU_EXECBUF_FENCE_FD_OUT",
        virtio_gpu::exec::FENCE_FD_OUT as u64,
    ),
    (
        "VIRTGPU_EXECBUF_RING_IDX",
        virtio_gpu::exec::RING_IDX as u64,
    ),
    (
        "VIRTGPU_EXECBUF_SYNCOBJ_RESET",
        virtio_gpu::exec::SYNCOBJ_RESET as u64,
    ),
    ("VIRTGPU_BLOB_MEM_GUEST", virtio_gpu::blob::MEM_GUEST as u64),
    (
        "VIRTGPU_BLOB_MEM_HOST3D",
        virtio_gpu::blob::MEM_HOST3D as u64,
    ),
    (
        "VIRTGPU_BLOB_MEM_HOST3D_GUEST",
        virtio_gpu::blob::MEM_HOST3D_GUEST as u64,
    ),
    (
        "VIRTGPU_BLOB_FLAG_USE_MAPPABLE",
        virtio_gpu::blob::USE_MAPPABLE as u64,
    ),
    (
        "VIRTGPU_BLOB_FLAG_USE_SHAREABLE",
        virtio_gpu::blob::USE_SHAREABLE as u64,
    ),
    (
        "VIRTGPU_BLOB_FLAG_USE_CROSS_DEVICE",
        virtio_gpu::blob::USE_CROSS_DEVICE as u64,
    ),
    (
        "VIRTGPU_CONTEXT_PARAM_CAPSET_ID",
        virtio_gpu::context::CAPSET_ID,
    ),
    (
        "VIRTGPU_CONTEXT_PARAM_NUM_RINGS",
        virtio_gpu::context::NUM_RINGS,
    ),
    (
        "VIRTGPU_CONTEXT_PARAM_POLL_RINGS_MASK",
        virtio_gpu::context::POLL_RINGS_MASK,
    ),
    (
        "VIRTGPU_CONTEXT_PARAM_DEBUG_NAME",
        virtio_gpu::context::DEBUG_NAME,
    ),
    ("VIRTGPU_WAIT_NOWAIT", virtio_gpu::WAIT_NOWAIT as u64),
];

/// Structs that stand in others as plain values.
const NESTED: &[&Struct] = &[virtio_gpu::Box3d::SCHEMA];

/// The families that have a header.
fn families() -> impl Iterator<Item = &'static Family> {
    family::ALL
        .iter()
        .copied()
        .filter(|family| !family.header.is_empty())
}

impl Kernel {
    /// The folder that `drm/drm.h` and the others lie in.
    fn headers(&self) -> PathBuf {
        let mut found: Vec<_> = fs::read_dir("/usr/src")
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        let start = format!("linux-headers-{}", self.version);
        found.retain(|path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&start) && path.join("include/uapi/drm/drm.h").is_file()
        });
        found.sort();
        let newest = found.pop().unwrap_or_else(|| {
            panic!(
                "no DRM headers in /usr/src/{start}*: install the newest of Debian's packages {0} \
                 (`apt-cache search --names-only '{0}$'` lists them)",
                self.package
            )
        });
        newest.join("include/uapi")
    }

    /// Bytes of the argument there; none when the ioctl is not there.
    fn size(&self, ioctl: &Ioctl) -> Option<u16> {
        if self.absent.contains(&ioctl.name) {
            return None;
        }
        let older = self.older.iter().find(|(name, _)| *name == ioctl.name);
        Some(older.map_or(ioctl.argument.size, |(_, size)| *size))
    }

    /// A C file that compiles if the tables agree with the headers.
    fn source(&self, ioctls: &[&'static Ioctl], nested: &[&'static Struct]) -> String {
        let root = self.headers();
        let mut source = String::from("#define __user\n#include <stddef.h>\n#include <fcntl.h>\n");
        for family in families() {
            let _ = writeln!(
                source,
                "#include \"{}\"",
                root.join(family.header).display()
            );
        }
        for ioctl in ioctls {
            let Some(size) = self.size(ioctl) else {
                let _ = writeln!(
                    source,
                    "#ifdef {0}\n#error {0} is there\n#endif",
                    ioctl.name
                );
                continue;
            };
            assert!(
                ioctl
                    .accept(command::with_size(ioctl.command, size))
                    .is_ok(),
                "{} has no form of {size} bytes",
                ioctl.name
            );
            let number = command::with_size(ioctl.command, size);
            equal(&mut source, ioctl.name, number.into());
            self.check_struct(&mut source, ioctl.argument, size);
        }
        for structure in nested {
            self.check_struct(&mut source, structure, structure.size);
        }
        source
    }

    fn check_struct(&self, source: &mut String, structure: &'static Struct, size: u16) {
        let name = structure.name;
        if self.absent_structs.contains(&name) {
            return;
        }
        equal(source, &format!("sizeof(struct {name})"), size.into());
        for field in structure.fields {
            if let Some(Kind::Pointer(pointer)) = field.rules.first().map(|rule| rule.kind)
                && let Element::Struct(inner) = pointer.element
            {
                self.check_struct(source, inner, inner.size);
            }
            if field.name.starts_with('_') || field.offset >= size {
                continue;
            }
            let field_name = field.name.trim_start_matches("r#");
            let renamed = self
                .renamed
                .iter()
                .find(|(of, now, _)| *of == name && *now == field_name);
            let field_name = renamed.map_or(field_name, |(_, _, there)| there);
            equal(
                source,
                &format!("offsetof(struct {name}, {field_name})"),
                field.offset.into(),
            );
            equal(
                source,
                &format!("sizeof(((struct {name} *)0)->{field_name})"),
                field.size.into(),
            );
        }
    }

    fn check(&self) {
        let ioctls: Vec<_> = families().flat_map(|family| family.ioctls).collect();
        let mut source = self.source(&ioctls, NESTED);
        for (name, value) in CONSTANTS {
            if !self.absent_constants.contains(name) {
                equal(&mut source, name, *value);
            }
        }
        let checks = source.matches("_Static_assert").count();
        assert!(checks > 300, "only {checks} checks");
        if let Err(errors) = compile(&source) {
            panic!(
                "the tables differ from the headers of Linux {}\n{errors}",
                self.version
            );
        }
    }
}

fn equal(source: &mut String, expression: &str, value: u64) {
    let _ = writeln!(
        source,
        "_Static_assert({expression} == {value}, \"{expression} is not {value}\");"
    );
}

/// What the C compiler says against a file, if anything.
fn compile(source: &str) -> Result<(), String> {
    let mut compiler = Command::new("cc")
        .args([
            "-std=gnu11",
            "-Wall",
            "-Werror",
            "-fsyntax-only",
            "-xc",
            "-",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot run `cc` ({error}): install Debian's packages gcc and libc6-dev")
        });
    let mut stdin = compiler.stdin.take().unwrap();
    stdin.write_all(source.as_bytes()).unwrap();
    drop(stdin);
    let output = compiler.wait_with_output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn the_newest_forms_are_those_of_linux_6_12() {
    NEWEST.check();
}

#[test]
fn the_older_forms_are_those_of_linux_6_1() {
    OLDER.check();
}

/// Names of the ioctls that a header defines.
fn defined(header: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(header).unwrap();
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next());
    names
        // The base is their type, not one of them.
        .filter(|name| name.starts_with("DRM_IOCTL_") && *name != "DRM_IOCTL_BASE")
        .map(str::to_owned)
        .collect()
}

/// Names that a family with a header has, and numbers of those that it refuses.
fn spoken(family: &Family) -> (BTreeSet<String>, BTreeSet<String>) {
    let ioctls = family.ioctls.iter().map(|ioctl| ioctl.name.to_owned());
    let refused = family.refused.iter().map(|row| row.name.to_owned());
    (ioctls.collect(), refused.collect())
}

#[test]
fn the_ioctls_of_each_header_are_those_with_a_schema_and_those_that_are_refused() {
    let root = NEWEST.headers();
    for family in families() {
        let (known, refused) = spoken(family);
        let mut all: BTreeSet<_> = known.union(&refused).cloned().collect();
        // A driver's table may use what the core's header defines: that is refused to the other drivers.
        if family.name != core::FAMILY.name {
            let (_, shared) = spoken(&core::FAMILY);
            all.retain(|name| !shared.contains(name));
        }
        assert!(!all.is_empty(), "{} has no ioctl", family.header);
        assert_eq!(all, defined(&root.join(family.header)), "{}", family.header);
    }
}

#[test]
fn the_ioctls_of_an_older_header_are_the_same_but_for_the_later_ones() {
    const LATER: &[&str] = &["DRM_IOCTL_MODE_CLOSEFB", "DRM_IOCTL_SYNCOBJ_EVENTFD"];
    let (newest, older) = (NEWEST.headers(), OLDER.headers());
    for family in families() {
        let mut expected = defined(&newest.join(family.header));
        expected.retain(|name| !LATER.contains(&name.as_str()));
        assert_eq!(
            defined(&older.join(family.header)),
            expected,
            "{}",
            family.header
        );
    }
}

#[test]
fn refused_ioctls_have_the_numbers_of_the_headers() {
    for kernel in [NEWEST, OLDER] {
        let root = kernel.headers();
        let mut source = String::from("#define __user\n#include <stddef.h>\n");
        for family in families() {
            let header = root.join(family.header);
            let _ = writeln!(source, "#include \"{}\"", header.display());
            let there = defined(&header);
            for row in family.refused.iter().filter(|row| there.contains(row.name)) {
                let number = format!("({} & 0xffff)", row.name);
                equal(
                    &mut source,
                    &number,
                    u64::from(command::TYPE) | u64::from(row.number),
                );
            }
        }
        let checks = source.matches("_Static_assert").count();
        assert!(checks > 80, "only {checks} checks");
        assert_eq!(compile(&source), Ok(()), "Linux {}", kernel.version);
    }
}

mod wrong {
    use pvgpu_protocol::schema::{Allocates, Answer, Blocking, Coherence, Ioctl, command, rule::*};
    use pvgpu_protocol::uapi_struct;

    uapi_struct! {
        /// `handle` and `offset` have changed places.
        pub struct Swapped = "drm_virtgpu_map" {
            handle: u32 = [VALUE],
            pad: u32 = [VALUE],
            offset: u64 = [VALUE],
        }
    }

    uapi_struct! {
        /// One field is too short, and one has another name.
        pub struct Shorter = "drm_virtgpu_map" {
            offset: u32 = [VALUE],
            rest: u32 = [VALUE],
            handle: u32 = [VALUE],
            pad: u32 = [VALUE],
        }
    }

    const fn map(command: u32, argument: &'static pvgpu_protocol::schema::Struct) -> Ioctl {
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_MAP",
            command,
            argument,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "",
        }
    }

    pub static SWAPPED: Ioctl = map(command::iowr::<Swapped>(0x41), Swapped::SCHEMA);
    pub static SHORTER: Ioctl = map(command::iowr::<Shorter>(0x41), Shorter::SCHEMA);
    pub static DIRECTION: Ioctl = map(
        command::iow::<pvgpu_protocol::family::virtio_gpu::Map>(0x41),
        pvgpu_protocol::family::virtio_gpu::Map::SCHEMA,
    );
}

#[test]
#[should_panic(expected = "install the newest of Debian's packages linux-headers-0.0.*-common")]
fn missing_headers_fail_with_a_remedy() {
    Kernel {
        version: "0.0.",
        package: "linux-headers-0.0.*-common",
        ..OLDER
    }
    .check();
}

#[test]
fn a_wrong_table_is_noticed() {
    for (ioctl, complaint) in [
        (
            &wrong::SWAPPED,
            "offsetof(struct drm_virtgpu_map, offset) is not 8",
        ),
        (
            &wrong::SHORTER,
            "sizeof(((struct drm_virtgpu_map *)0)->offset) is not 4",
        ),
        (&wrong::SHORTER, "no member named"),
        (&wrong::DIRECTION, "DRM_IOCTL_VIRTGPU_MAP is not"),
    ] {
        let errors = compile(&NEWEST.source(&[ioctl], &[])).unwrap_err();
        assert!(errors.contains(complaint), "no {complaint:?} in\n{errors}");
    }
    let known = virtio_gpu::FAMILY
        .ioctls
        .iter()
        .find(|ioctl| ioctl.command == virtio_gpu::MAP);
    assert_eq!(compile(&NEWEST.source(&[known.unwrap()], &[])), Ok(()));
}
