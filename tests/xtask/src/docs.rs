//! `cargo xtask docs`: writes the pages of `docs/` that are made from the tables, or checks that they are current.
//! People call it after changing a table; a test here calls the check.

use pvgpu_protocol::family::{self, Family, refused::Refused};
use pvgpu_protocol::schema::{
    Allocates, Answer, Blocking, Coherence, Condition, Count, Descriptor, Direction, Element,
    Ioctl, Kind, Space, Struct, command,
};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

/// Options of `cargo xtask docs`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Change nothing, fail if a page is not current
    #[arg(long)]
    check: bool,
}

/// Why the pages are not there as they should be.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0} is not what the tables say: run `cargo xtask docs` and commit the page")]
    Stale(PathBuf),
    #[error("cannot use {path}: {error}")]
    File { path: PathBuf, error: io::Error },
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let result = match arguments.check {
        true => check(),
        false => write(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The page of all ioctls.
fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/ioctls.md")
}

fn write() -> Result<(), Error> {
    let path = path();
    fs::write(&path, page()).map_err(|error| Error::File { path, error })
}

fn check() -> Result<(), Error> {
    let path = path();
    match fs::read_to_string(&path) {
        Ok(text) if text == page() => Ok(()),
        Ok(_) => Err(Error::Stale(path)),
        Err(error) => Err(Error::File { path, error }),
    }
}

const INTRODUCTION: &str = "\
# The ioctls that a guest may use

<!-- Written by `cargo xtask docs` from the tables in `protocol/src/family`. Change those, not this page. -->

Each family's table says what becomes of its ioctls:

- *Forwarded*: the proxy checks each field by its rule, then the host's driver performs it.
- *Answered locally*: the guest driver knows the answer, and nothing is sent: either from the start, because the hello has
  said who the host's driver is, or after the first time that the call succeeded with the same input. Only where the
  host's driver cannot change its mind; and no longer once it says that its device is gone.
- *Refused*: with the errno that the kernel gives on a render node. So does the proxy, whatever the guest sends.

What is not on this page gets what the kernel gives, too: `EINVAL`, or `ENOTTY` when it is no ioctl of DRM's type (`'d'`).
Of what is forwarded, the proxy checks each field before the host's driver sees anything:

- A command whose size is none of the listed ones: `EINVAL`. Fields that an older, shorter form lacks count as zero.
- An array with more elements than its limit: `E2BIG`. A null pointer where there are elements: `EFAULT`, unless it
  *may be null*.
- *Output* and *padding*: what the guest puts there never reaches the driver.
- *File descriptors* travel as numbers of the session's objects (`EBADF` when there is none such), *addresses* do not
  travel at all, and *times* travel as time from now.
- *May wait*: the call runs on a thread of its own and can be cancelled (`EINTR`).
- *To the host*, *to the guest*: in a guest without an aperture, where memory is mapped with pages of the guest
  ([map_pages](protocol.md#map_pages-12)), the call takes what the guest has written to the host before it, or what the GPU has
  written to the guest after it. A driver that has no call of the first sort has no `mmap` there (`ENODEV`).
- *Allocates*: counts against the guest's memory (`ENOMEM`) until the last handle is closed, in whole pages.

";

/// The whole page.
fn page() -> String {
    let mut page = String::from(INTRODUCTION);
    page.push_str("| driver | its ioctls | `mmap` without an aperture |\n| --- | --- | --- |\n");
    for family in family::ALL {
        let families = family::of_driver(family.name);
        if !families.is_empty() {
            let titles: Vec<_> = families.iter().map(|family| link(family)).collect();
            let mmap = match family::maps_pages(families) {
                true => "with pages of the guest",
                false => "`ENODEV`",
            };
            let titles = titles.join(", ");
            let _ = writeln!(page, "| `{}` | {titles} | {mmap} |", family.name);
        }
    }
    for family in family::ALL {
        write_family(&mut page, family);
    }
    page
}

fn title(family: &Family) -> String {
    match family.name {
        "drm" => "DRM core".into(),
        name => name.into(),
    }
}

fn link(family: &Family) -> String {
    let title = title(family);
    let anchor = title.to_lowercase().replace(' ', "-");
    format!("[{title}](#{anchor})")
}

fn write_family(page: &mut String, family: &Family) {
    let _ = writeln!(page, "\n## {}\n", title(family));
    let _ = match family.header {
        "" => writeln!(page, "Defined by pvgpu itself.\n"),
        header => writeln!(page, "Defined by `{header}` of Linux.\n"),
    };
    page.push_str("| number | ioctl | what it does | what becomes of it |\n");
    page.push_str("| --- | --- | --- | --- |\n");
    for ioctl in family.ioctls {
        let _ = writeln!(
            page,
            "| {:#04x} | [`{2}`](#{1}) | {3} | {4} |",
            ioctl.command & 0xff,
            ioctl.name.to_lowercase(),
            ioctl.name.trim_start_matches("DRM_IOCTL_"),
            ioctl.summary,
            fate(ioctl),
        );
    }
    if !family.refused.is_empty() {
        page.push_str(
            "\nRefused:\n\n| number | ioctl | errno | why |\n| --- | --- | --- | --- |\n",
        );
    }
    for row in family.refused {
        let _ = writeln!(
            page,
            "| {:#04x} | `{}` | `{}` | {}{} |",
            row.number,
            row.name.trim_start_matches("DRM_IOCTL_"),
            row.errno,
            row.why,
            exceptions(row),
        );
    }
    for ioctl in family.ioctls {
        write_ioctl(page, ioctl);
    }
}

/// Who answers an ioctl, in words.
fn fate(ioctl: &Ioctl) -> String {
    match ioctl.answer {
        Answer::Forwarded => "forwarded".into(),
        Answer::Constant => "answered locally after the first time".into(),
        Answer::ConstantUnless(condition) => format!(
            "answered locally after the first time; forwarded if {}",
            words(ioctl.argument, &condition)
        ),
        Answer::Identity => "answered locally".into(),
    }
}

/// The drivers for which a refused ioctl has a schema after all.
fn exceptions(row: &Refused) -> String {
    let drivers: Vec<_> = family::ALL
        .iter()
        .filter(|family| family.ioctls.iter().any(|ioctl| ioctl.name == row.name))
        .map(|family| link(family))
        .collect();
    match drivers.as_slice() {
        [] => String::new(),
        drivers => format!("; but forwarded for {}", drivers.join(", ")),
    }
}

fn write_ioctl(page: &mut String, ioctl: &Ioctl) {
    let argument = ioctl.argument;
    let direction = match (
        ioctl.command & command::WRITE,
        ioctl.command & command::READ,
    ) {
        (0, _) => "written by the driver",
        (_, 0) => "read by the driver",
        _ => "read and written by the driver",
    };
    let _ = writeln!(page, "\n### `{}`\n\n{}\n", ioctl.name, ioctl.summary);
    let _ = write!(
        page,
        "Command `{:#010x}`, `struct {}` of {} bytes",
        ioctl.command, argument.name, argument.size
    );
    if !ioctl.older_sizes.is_empty() {
        let sizes: Vec<_> = ioctl.older_sizes.iter().map(u16::to_string).collect();
        let _ = write!(page, " (older forms: {})", sizes.join(", "));
    }
    let _ = write!(page, ", {direction}. ");
    page.push_str(&match ioctl.blocking {
        Blocking::Never => "Never waits.".to_owned(),
        Blocking::Always => "May wait.".to_owned(),
        Blocking::When(condition) => format!("May wait if {}.", words(argument, &condition)),
        Blocking::Unless(conditions) => {
            let conditions: Vec<_> = conditions.iter().map(|one| words(argument, one)).collect();
            format!("May wait unless {}.", conditions.join(" and "))
        }
    });
    page.push_str(&match ioctl.allocates {
        Allocates::Nothing => String::new(),
        Allocates::Bytes(bytes) => format!(" Allocates {} bytes.", name(argument, bytes)),
        Allocates::Image {
            width,
            height,
            bits_per_pixel,
        } => format!(
            " Allocates {} x {} x {} bits.",
            name(argument, width),
            name(argument, height),
            name(argument, bits_per_pixel)
        ),
    });
    page.push_str(match ioctl.coherence {
        Coherence::None => "",
        Coherence::Offset(_) => " Tells where to map.",
        Coherence::ToHost => " To the host.",
        Coherence::ToGuest => " To the guest.",
    });
    page.push('\n');
    write_struct(page, argument);
}

fn write_struct(page: &mut String, structure: &Struct) {
    page.push_str("\n| offset | bytes | field | meaning |\n| ---: | ---: | --- | --- |\n");
    for field in structure.fields {
        let label = match field.name.starts_with('_') {
            true => "(no name)".to_owned(),
            false => format!("`{}`", plain(field.name)),
        };
        let rules: Vec<_> = field
            .rules
            .iter()
            .map(|rule| {
                let meaning = meaning(structure, field.name, &rule.kind);
                match rule.when {
                    Some(condition) => format!("if {}: {meaning}", words(structure, &condition)),
                    None if field.rules.len() > 1 => format!("otherwise {meaning}"),
                    None => meaning,
                }
            })
            .collect();
        let _ = writeln!(
            page,
            "| {} | {} | {label} | {} |",
            field.offset,
            field.size,
            rules.join("; ")
        );
    }
    for field in structure.fields {
        for rule in field.rules {
            if let Kind::Pointer(pointer) = rule.kind
                && let Element::Struct(inner) = pointer.element
            {
                let _ = writeln!(
                    page,
                    "\nEach element of `{}` is a `struct {}` of {} bytes:",
                    plain(field.name),
                    inner.name,
                    inner.size
                );
                write_struct(page, inner);
            }
        }
    }
}

/// A field's name without what Rust puts before its keywords.
fn plain(name: &str) -> &str {
    name.trim_start_matches("r#")
}

/// The name of the field at that offset.
fn name(structure: &Struct, offset: u16) -> String {
    let field = structure.fields.iter().find(|field| field.offset == offset);
    format!("`{}`", field.map_or("?", |field| plain(field.name)))
}

/// A condition in words.
fn words(structure: &Struct, condition: &Condition) -> String {
    let Condition {
        field,
        mask,
        equals,
    } = *condition;
    let field = name(structure, field);
    match (mask, equals) {
        (u64::MAX, _) => format!("{field} is {equals}"),
        (_, 0) => format!("{field} has none of {mask:#x}"),
        _ if mask == equals => format!("{field} has {mask:#x}"),
        _ => format!("{field} & {mask:#x} is {equals:#x}"),
    }
}

/// What a file descriptor is of.
fn descriptor(of: Descriptor) -> &'static str {
    match of {
        Descriptor::DmaBuf => "dma-buf",
        Descriptor::SyncFile => "sync_file",
        Descriptor::Syncobj => "syncobj",
        Descriptor::Eventfd => "eventfd",
    }
}

fn space(space: Space) -> &'static str {
    match space {
        Space::Gem => "GEM handle",
        Space::Syncobj => "syncobj handle",
    }
}

/// What a rule says, in words.
fn meaning(structure: &Struct, field: &str, kind: &Kind) -> String {
    match *kind {
        Kind::Value => "value, judged by the driver".into(),
        Kind::Output if field.starts_with('_') || field.starts_with("pad") => "padding".into(),
        Kind::Output => "output".into(),
        Kind::Zero | Kind::Flags(0) => "must be zero (`EINVAL`)".into(),
        Kind::Flags(allowed) => format!("flags; only {allowed:#x} may be set (`EINVAL`)"),
        Kind::OneOf(values) => {
            let values: Vec<_> = values.iter().map(u64::to_string).collect();
            format!("one of {} (`EINVAL`)", values.join(", "))
        }
        Kind::Handle { space: of, unknown } => {
            format!("{} of this file (`{unknown}`)", space(of))
        }
        Kind::OptionalHandle { space: of, unknown } => {
            format!("{} of this file (`{unknown}`), or zero for none", space(of))
        }
        Kind::ClosedHandle { space: of, unknown } => {
            format!(
                "{} of this file (`{unknown}`), which it gives back",
                space(of)
            )
        }
        Kind::NewHandle(of) => format!("output: new {}", space(of)),
        Kind::Fd(Direction::In, of, _) => format!("{} fd", descriptor(of)),
        Kind::Fd(Direction::Out, of, None) => format!("output: new {} fd", descriptor(of)),
        Kind::Fd(Direction::Out, of, Some(flags)) => {
            let flags = name(structure, flags);
            format!("output: new {} fd, open as {flags} says", descriptor(of))
        }
        Kind::Fd(Direction::InOut, of, _) => {
            format!("{0} fd; then output: new {0} fd", descriptor(of))
        }
        Kind::Deadline => "point in time (`CLOCK_MONOTONIC`, nanoseconds)".into(),
        Kind::Pointer(pointer) => {
            let elements = match pointer.element {
                Element::Bytes(1) => "bytes".to_owned(),
                Element::Bytes(size) => format!("elements of {size} bytes"),
                Element::Handles { space: of, unknown } => {
                    format!("{}s of this file (`{unknown}`)", space(of))
                }
                Element::Struct(inner) => format!("`struct {}`", inner.name),
            };
            let count = match pointer.count {
                Count::Fixed(count) => match (count, pointer.element) {
                    (1, Element::Bytes(size)) => format!("address of {size} bytes"),
                    _ => format!("address of {count} {elements}"),
                },
                Count::Field(offset) => format!(
                    "address of {} {elements}, at most {}",
                    name(structure, offset),
                    pointer.max
                ),
            };
            let direction = match pointer.direction {
                Direction::In => "read",
                Direction::Out => "output",
                Direction::InOut => "output, unchanged where the driver writes nothing",
            };
            let null = if pointer.nullable {
                "; may be null"
            } else {
                ""
            };
            format!("{count}; {direction}{null}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_ioctls_is_current() {
        check().unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn every_ioctl_has_its_heading_and_every_field_its_row() {
        let page = page();
        for ioctl in family::ALL.iter().flat_map(|family| family.ioctls) {
            let start = page.find(&format!("\n### `{}`\n", ioctl.name)).unwrap();
            let text = &page[start..];
            for field in ioctl
                .argument
                .fields
                .iter()
                .filter(|field| !field.name.starts_with('_'))
            {
                let row = format!(
                    "| {} | {} | `{}` | ",
                    field.offset,
                    field.size,
                    plain(field.name)
                );
                assert!(text.contains(&row), "{}: {row}", ioctl.name);
            }
        }
    }

    #[test]
    fn every_ioctl_says_once_for_its_family_what_becomes_of_it() {
        let page = page();
        for family in family::ALL {
            let section = format!("\n## {}\n", title(family));
            let text = &page[page.find(&section).unwrap() + section.len()..];
            let text = &text[..text.find("\n### ").unwrap()];
            let rows = |name: &str| -> Vec<&str> {
                let name = format!("`{}`", name.trim_start_matches("DRM_IOCTL_"));
                let rows = text.lines().filter(|line| line.starts_with("| 0x"));
                rows.filter(|line| line.contains(&name)).collect()
            };
            for ioctl in family.ioctls {
                let rows = rows(ioctl.name);
                assert_eq!(rows.len(), 1, "{}: {rows:?}", ioctl.name);
                assert!(rows[0].ends_with(&format!("| {} |", fate(ioctl))));
            }
            for row in family.refused {
                let rows = rows(row.name);
                assert_eq!(rows.len(), 1, "{}: {rows:?}", row.name);
                assert!(rows[0].contains(&format!("| `{}` | {}", row.errno, row.why)));
            }
        }
        assert!(page.contains("belong to the primary node; but forwarded for [vgem](#vgem) |"));
    }

    #[test]
    fn conditions_read_like_sentences() {
        let execbuffer = pvgpu_protocol::family::virtio_gpu::Execbuffer::SCHEMA;
        let condition = |mask, equals| {
            words(
                execbuffer,
                &Condition {
                    field: 0,
                    mask,
                    equals,
                },
            )
        };
        assert_eq!(condition(1, 1), "`flags` has 0x1");
        assert_eq!(condition(1, 0), "`flags` has none of 0x1");
        assert_eq!(condition(u64::MAX, 4), "`flags` is 4");
        assert_eq!(condition(3, 1), "`flags` & 0x3 is 0x1");
    }
}
