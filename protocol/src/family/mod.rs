//! The tables: one file per host GPU family, and which of them a host driver speaks.

pub mod core;
pub mod refused;
pub mod soft;
pub mod vgem;
pub mod virtio_gpu;

use crate::Errno;
use crate::schema::{Coherence, Ioctl, command};
use refused::Refused;

/// The ioctls of one header.
#[derive(Debug)]
pub struct Family {
    /// Name of the host driver, or `drm` for what all share.
    pub name: &'static str,
    /// The C header that defines it, as it is included; empty for a header that is only ours.
    pub header: &'static str,
    /// Its ioctls in order of their numbers.
    pub ioctls: &'static [Ioctl],
    /// The ioctls of that header that no guest may use, in order of their numbers.
    pub refused: &'static [Refused],
}

/// The ioctl among those of `families` that has the command's type and number.
///
/// What there is none of gets the errno of a kernel's render node (`drm_ioctl.c`): `ENOTTY` when it is no ioctl of DRM's
/// type, that of its row when it is [refused](Refused), otherwise `EINVAL`.
pub fn find(families: &[&'static Family], command: u32) -> Result<&'static Ioctl, Errno> {
    let ioctls = families.iter().flat_map(|family| family.ioctls);
    let refused = families.iter().flat_map(|family| family.refused);
    match ioctls
        .into_iter()
        .find(|ioctl| (ioctl.command ^ command) & 0xffff == 0)
    {
        Some(ioctl) => Ok(ioctl),
        None if command & 0xff00 != command::TYPE => Err(Errno::ENOTTY),
        None => Err(refused
            .into_iter()
            .find(|row| u32::from(row.number) == command & 0xff)
            .map_or(Errno::EINVAL, |row| row.errno)),
    }
}

/// Whether memory can be mapped with pages of the guest: some ioctl takes to the host what a guest has written there. A driver
/// with none would never hear of it.
pub fn maps_pages(families: &[&'static Family]) -> bool {
    let mut ioctls = families.iter().flat_map(|family| family.ioctls);
    ioctls.any(|ioctl| ioctl.coherence == Coherence::ToHost)
}

/// All families.
pub static ALL: &[&Family] = &[
    &core::FAMILY,
    &soft::FAMILY,
    &vgem::FAMILY,
    &virtio_gpu::FAMILY,
];

/// The families that the host driver of that name speaks; none for an unknown driver.
pub fn of_driver(name: &str) -> &'static [&'static Family] {
    match name {
        "soft" => const { &[&core::FAMILY, &soft::FAMILY] },
        "vgem" => const { &[&core::FAMILY, &vgem::FAMILY] },
        "virtio_gpu" => const { &[&core::FAMILY, &virtio_gpu::FAMILY] },
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{
        Allocates, Answer, Blocking, Condition, Count, Element, Kind, Space, Struct,
    };
    use crate::{at, uapi_struct};
    use std::collections::BTreeSet;
    use std::format;
    use std::string::String;
    use std::vec::Vec;

    /// What is wrong with a table, one line each.
    fn faults(ioctls: &'static [Ioctl]) -> Vec<String> {
        let mut faults = Vec::new();
        let mut last = None;
        for ioctl in ioctls {
            let mut fault = |text: String| faults.push(format!("{}: {text}", ioctl.name));
            let number = ioctl.command & 0xff;
            if last.replace(number).is_some_and(|last| last >= number) {
                fault(format!("number {number:#x} is not above the one before"));
            }
            if ioctl.command & 0xff00 != u32::from(b'd') << 8 {
                fault("is no DRM ioctl".into());
            }
            if ioctl.command & (command::READ | command::WRITE) == 0 {
                fault("has no direction".into());
            }
            if command::size(ioctl.command) != ioctl.argument.size {
                fault("its command has another size than its argument".into());
            }
            let boundaries: BTreeSet<_> = ioctl
                .argument
                .fields
                .iter()
                .map(|field| field.offset)
                .collect();
            for (index, size) in ioctl.older_sizes.iter().enumerate() {
                if *size == 0 || !boundaries.contains(size) {
                    fault(format!("its older size {size} ends inside a field"));
                }
                if ioctl.older_sizes[..index].contains(size) {
                    fault(format!("its older size {size} stands there twice"));
                }
            }
            let conditions: &[Condition] = match &ioctl.blocking {
                Blocking::Never | Blocking::Always => &[],
                Blocking::When(condition) => std::slice::from_ref(condition),
                Blocking::Unless(conditions) => {
                    if conditions.is_empty() {
                        fault("never waits, but does not say so".into());
                    }
                    conditions
                }
            };
            for condition in conditions {
                faults.extend(condition_faults(ioctl.name, ioctl.argument, condition));
            }
            if let Answer::ConstantUnless(condition) = &ioctl.answer {
                faults.extend(condition_faults(ioctl.name, ioctl.argument, condition));
            }
            if ioctl.answer != Answer::Forwarded
                && (ioctl.allocates != Allocates::Nothing || changes_a_file(ioctl.argument))
            {
                faults.push(format!(
                    "{}: a constant answer cannot make or use what a file owns",
                    ioctl.name
                ));
            }
            let sizes: &[u16] = match &ioctl.allocates {
                Allocates::Nothing => &[],
                Allocates::Bytes(bytes) => &[*bytes],
                Allocates::Image {
                    width,
                    height,
                    bits_per_pixel,
                } => &[*width, *height, *bits_per_pixel],
            };
            for offset in sizes {
                if integer(ioctl.argument, *offset).is_none() {
                    faults.push(format!(
                        "{}: allocates by offset {offset}, where no integer is",
                        ioctl.name
                    ));
                }
            }
            let creates = ioctl.argument.fields.iter().flat_map(|field| field.rules);
            if !sizes.is_empty()
                && !creates
                    .clone()
                    .any(|rule| matches!(rule.kind, Kind::NewHandle(_)))
            {
                faults.push(format!(
                    "{}: allocates memory that no new handle holds",
                    ioctl.name
                ));
            }
            if ioctl.coherence != Coherence::None && ioctl.answer != Answer::Forwarded {
                faults.push(format!("{}: synchronizes without the host", ioctl.name));
            }
            if let Coherence::Offset(offset) = ioctl.coherence {
                let field = ioctl
                    .argument
                    .fields
                    .iter()
                    .find(|field| field.offset == offset);
                if field.is_none_or(|field| field.size != 8 || field.rules != [OUTPUT]) {
                    faults.push(format!("{}: gives no offset at {offset}", ioctl.name));
                }
                let handles = ioctl.argument.fields.iter().flat_map(|field| field.rules);
                let gem = |rule: &&Rule| {
                    matches!(
                        rule.kind,
                        Kind::Handle {
                            space: Space::Gem,
                            ..
                        }
                    )
                };
                if handles.filter(gem).count() != 1 {
                    faults.push(format!("{}: gives the offset of no one buffer", ioctl.name));
                }
            }
            faults.extend(struct_faults(ioctl.argument, 1));
            if ioctl.command & command::READ == 0 {
                for rule in creates {
                    if matches!(
                        rule.kind,
                        Kind::NewHandle(_) | Kind::Fd(crate::schema::Direction::Out, ..)
                    ) {
                        faults.push(format!(
                            "{}: gives something out that it never writes back",
                            ioctl.name
                        ));
                    }
                }
            }
        }
        faults
    }

    /// Whether handles, file descriptors or points in time go in or out.
    fn changes_a_file(structure: &Struct) -> bool {
        let mut kinds = structure
            .fields
            .iter()
            .flat_map(|field| field.rules)
            .map(|rule| rule.kind);
        kinds.any(|kind| match kind {
            Kind::Value | Kind::Output | Kind::Zero | Kind::Flags(_) | Kind::OneOf(_) => false,
            Kind::Pointer(pointer) => match pointer.element {
                Element::Bytes(_) => false,
                Element::Handles { .. } => true,
                Element::Struct(inner) => changes_a_file(inner),
            },
            _ => true,
        })
    }

    /// The size of the integer field at that offset.
    fn integer(structure: &Struct, offset: u16) -> Option<u16> {
        let field = structure
            .fields
            .iter()
            .find(|field| field.offset == offset)?;
        matches!(field.size, 1 | 2 | 4 | 8).then_some(field.size)
    }

    fn condition_faults(name: &str, structure: &Struct, condition: &Condition) -> Vec<String> {
        let mut faults = Vec::new();
        match integer(structure, condition.field) {
            None => faults.push(format!(
                "{name}: condition on offset {}, where no integer is",
                condition.field
            )),
            Some(size) => {
                let values = u64::MAX >> (64 - 8 * size);
                if condition.equals & !(condition.mask & values) != 0 {
                    faults.push(format!("{name}: condition that never holds"));
                }
            }
        }
        faults
    }

    fn struct_faults(structure: &'static Struct, depth: u8) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |text: String| faults.push(format!("{}: {text}", structure.name));
        let mut end = 0;
        let mut names = BTreeSet::new();
        for field in structure.fields {
            let name = field.name;
            if !names.insert(name) {
                fault(format!("{name} stands there twice"));
            }
            if field.offset != end {
                fault(format!(
                    "{name} starts at {} instead of {end}",
                    field.offset
                ));
            }
            end = field.offset + field.size;
            if field.rules.last().is_none_or(|rule| rule.when.is_some()) {
                fault(format!("{name}: its last rule has a condition"));
            }
            for (index, rule) in field.rules.iter().enumerate() {
                if rule.when.is_none() && index + 1 != field.rules.len() {
                    fault(format!("{name}: rules behind one without a condition"));
                }
                let allowed: &[u16] = match rule.kind {
                    Kind::Value | Kind::Output | Kind::Zero => &[],
                    Kind::Flags(_) | Kind::OneOf(_) => &[1, 2, 4, 8],
                    Kind::Handle { .. }
                    | Kind::OptionalHandle { .. }
                    | Kind::ClosedHandle { .. }
                    | Kind::NewHandle(_)
                    | Kind::Fd(..) => &[4],
                    Kind::Deadline | Kind::Pointer(_) => &[8],
                };
                if !allowed.is_empty() && !allowed.contains(&field.size) {
                    fault(format!(
                        "{name}: {} bytes are the wrong size for its rule",
                        field.size
                    ));
                }
                if let Kind::Flags(allowed) = rule.kind
                    && field.size < 8
                    && allowed >> (8 * field.size) != 0
                {
                    fault(format!("{name}: flags beyond its size"));
                }
                if let Kind::Pointer(pointer) = rule.kind {
                    match pointer.count {
                        Count::Fixed(count) if count > pointer.max => {
                            fault(format!("{name}: more elements than its limit"));
                        }
                        Count::Field(offset) if integer(structure, offset).is_none() => {
                            fault(format!(
                                "{name}: counted by offset {offset}, where no integer is"
                            ));
                        }
                        _ => {}
                    }
                    if pointer.max == 0 || pointer.element.size() == 0 {
                        fault(format!("{name}: points to nothing"));
                    }
                }
            }
        }
        if end != structure.size {
            fault(format!("fields end at {end} of {}", structure.size));
        }
        for rule in structure.fields.iter().flat_map(|field| field.rules) {
            if let Some(condition) = &rule.when {
                faults.extend(condition_faults(structure.name, structure, condition));
            }
            if let Kind::Pointer(pointer) = rule.kind
                && let Element::Struct(inner) = pointer.element
            {
                if depth >= crate::layout::DEPTH_MAX && inner.has_pointers() {
                    faults.push(format!("{}: nested too deep", structure.name));
                } else {
                    faults.extend(struct_faults(inner, depth + 1));
                }
                if !pointer.direction.is_in() && inner.has_pointers() {
                    faults.push(format!("{}: pointers that only come out", structure.name));
                }
            }
        }
        faults
    }

    #[test]
    fn no_table_contradicts_itself() {
        for family in ALL {
            assert_eq!(
                faults(family.ioctls),
                Vec::<String>::new(),
                "family {}",
                family.name
            );
        }
    }

    #[test]
    fn a_driver_whose_memory_goes_to_the_host_at_some_points_comes_back_at_others() {
        for (name, expected) in [("soft", true), ("virtio_gpu", true), ("vgem", false)] {
            let families = of_driver(name);
            assert_eq!(maps_pages(families), expected, "{name}");
            let ioctls = || families.iter().flat_map(|family| family.ioctls);
            let offsets = ioctls().filter(|ioctl| matches!(ioctl.coherence, Coherence::Offset(_)));
            assert_eq!(offsets.count(), usize::from(expected), "{name}");
            let own = families.last().unwrap().ioctls.iter();
            let comes_back = own.filter(|ioctl| ioctl.coherence == Coherence::ToGuest);
            assert_eq!(comes_back.count(), usize::from(expected), "{name}");
        }
    }

    #[test]
    fn no_two_ioctls_of_a_driver_have_the_same_number() {
        for name in ALL.iter().map(|family| family.name) {
            let mut numbers = BTreeSet::new();
            for ioctl in of_driver(name).iter().flat_map(|family| family.ioctls) {
                assert!(
                    numbers.insert(ioctl.command & 0xff),
                    "{} of {name}",
                    ioctl.name
                );
            }
        }
    }

    #[test]
    fn every_driver_speaks_the_drm_core_and_its_own_family() {
        for family in ALL.iter().filter(|family| family.name != core::FAMILY.name) {
            let names: Vec<_> = of_driver(family.name)
                .iter()
                .map(|family| family.name)
                .collect();
            assert_eq!(names, ["drm", family.name]);
        }
        assert!(of_driver("drm").is_empty());
        assert!(of_driver("no such driver").is_empty());
    }

    #[test]
    fn an_ioctl_is_found_by_type_and_number_whatever_its_size() {
        let families = of_driver("virtio_gpu");
        let older = command::with_size(virtio_gpu::EXECBUFFER, 32);
        let found = find(families, older).unwrap();
        assert_eq!(found.name, "DRM_IOCTL_VIRTGPU_EXECBUFFER");
        assert_eq!(found.accept(older), Ok(32));
    }

    #[test]
    fn what_a_guest_may_not_use_gets_the_errno_of_a_render_node() {
        let error = |driver, command| find(of_driver(driver), command).err();
        assert_eq!(error("vgem", vgem::CREATE_DUMB), None);
        assert_eq!(error("virtio_gpu", vgem::CREATE_DUMB), Some(Errno::EACCES));
        let (legacy, unknown) = (command::iow::<u32>(0x14), command::iowr::<u32>(0x9f));
        for driver in ["soft", "vgem", "virtio_gpu"] {
            assert_eq!(error(driver, legacy), Some(Errno::EINVAL), "{driver}");
            assert_eq!(error(driver, unknown), Some(Errno::EINVAL), "{driver}");
            let other_type = core::VERSION ^ 0x100;
            assert_eq!(error(driver, other_type), Some(Errno::ENOTTY), "{driver}");
        }
    }

    #[test]
    fn refused_ioctls_are_in_order_and_say_why() {
        for family in ALL {
            let numbers: Vec<_> = family.refused.iter().map(|row| row.number).collect();
            assert!(numbers.is_sorted_by(|a, b| a < b), "{}", family.name);
            for row in family.refused {
                assert!(!row.why.is_empty(), "{}", row.name);
                let known = family.ioctls.iter().any(|ioctl| ioctl.name == row.name);
                assert!(!known, "{} is refused and has a schema", row.name);
            }
        }
    }

    #[test]
    fn what_changes_is_no_constant() {
        use zerocopy::IntoBytes;
        let is_constant = |driver, command, argument: &[u8]| {
            find(of_driver(driver), command)
                .unwrap()
                .is_constant(argument)
        };
        for (param, expected) in [
            (soft::param::MEMORY_SIZE, true),
            (soft::param::MEMORY_FREE, false),
        ] {
            let argument = soft::GetParam { param, value: 0 };
            let found = is_constant("soft", soft::DRM_IOCTL_SOFT_GETPARAM, argument.as_bytes());
            assert_eq!(found, expected, "parameter {param}");
        }
        let param = virtio_gpu::GetParam::default();
        assert!(is_constant(
            "virtio_gpu",
            virtio_gpu::GETPARAM,
            param.as_bytes()
        ));
        let wait = virtio_gpu::Wait::default();
        assert!(!is_constant(
            "virtio_gpu",
            virtio_gpu::WAIT,
            wait.as_bytes()
        ));
    }

    #[test]
    fn a_submission_waits_only_for_fences_that_it_names() {
        use zerocopy::IntoBytes;
        let ioctl = find(of_driver("virtio_gpu"), virtio_gpu::EXECBUFFER).unwrap();
        let mut argument = virtio_gpu::Execbuffer {
            flags: virtio_gpu::exec::FENCE_FD_OUT,
            ..Default::default()
        };
        assert!(!ioctl.may_block(argument.as_bytes()));
        argument.num_in_syncobjs = 1;
        assert!(ioctl.may_block(argument.as_bytes()));
        assert!(!ioctl.may_block(&argument.as_bytes()[..32]));
        argument.flags |= virtio_gpu::exec::FENCE_FD_IN;
        assert!(ioctl.may_block(&argument.as_bytes()[..32]));
    }

    #[test]
    fn memory_is_counted_in_whole_pages() {
        use zerocopy::IntoBytes;
        let create = find(of_driver("virtio_gpu"), virtio_gpu::RESOURCE_CREATE).unwrap();
        let bytes = |size| {
            create.allocated_bytes(
                virtio_gpu::ResourceCreate {
                    size,
                    ..Default::default()
                }
                .as_bytes(),
            )
        };
        assert_eq!((bytes(0), bytes(4096), bytes(4097)), (4096, 4096, 8192));
        let dumb = find(of_driver("vgem"), vgem::CREATE_DUMB).unwrap();
        let argument = vgem::CreateDumb {
            width: u32::MAX,
            height: u32::MAX,
            bpp: u32::MAX,
            ..Default::default()
        };
        assert!(dumb.allocated_bytes(argument.as_bytes()) >= u64::MAX / 8);
    }

    uapi_struct! {
        struct Broken = "broken" {
            count: u32 = [VALUE],
            short: u32 = [pointer(Direction::In, Element::Bytes(1), Count::Field(2), 1)],
            condition: u64 = [VALUE.when(at!(count), 1, 2)],
        }
    }

    use crate::schema::{Direction, Rule, rule::*};

    #[test]
    fn a_table_that_contradicts_itself_is_noticed() {
        static BROKEN: &[Ioctl] = &[Ioctl {
            name: "BROKEN",
            command: command::iowr::<u32>(1),
            argument: Broken::SCHEMA,
            older_sizes: &[6],
            blocking: Blocking::When(Condition {
                field: 3,
                mask: 1,
                equals: 1,
            }),
            allocates: Allocates::Bytes(1),
            answer: Answer::ConstantUnless(Condition {
                field: 5,
                mask: 1,
                equals: 1,
            }),
            coherence: Coherence::Offset(4),
            summary: "",
        }];
        let faults = faults(BROKEN).join("\n");
        for expected in [
            "BROKEN: its command has another size than its argument",
            "BROKEN: its older size 6 ends inside a field",
            "BROKEN: condition on offset 3, where no integer is",
            "BROKEN: condition on offset 5, where no integer is",
            "BROKEN: a constant answer cannot make or use what a file owns",
            "BROKEN: allocates by offset 1, where no integer is",
            "BROKEN: synchronizes without the host",
            "BROKEN: gives no offset at 4",
            "BROKEN: gives the offset of no one buffer",
            "BROKEN: allocates memory that no new handle holds",
            "broken: short: 4 bytes are the wrong size for its rule",
            "broken: short: counted by offset 2, where no integer is",
            "broken: condition: its last rule has a condition",
            "broken: condition that never holds",
        ] {
            assert!(faults.contains(expected), "{expected} not in\n{faults}");
        }
    }
}
