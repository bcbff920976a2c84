//! What a shadow promises to guest and GPU, over files as objects and made-up guest memory.

use super::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use vm_memory::GuestMemoryMmap;

const PAGE: u64 = PAGE_SIZE;
/// Pages of guest memory.
const RAM: u64 = 64;

/// A file without a name that can be cut off, unlike an object of the embedded GPU.
fn object(pages: u64) -> File {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("pvgpu-shadow-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(pages * PAGE).unwrap();
    file
}

fn pages() -> Pages {
    let ram = usize::try_from(RAM * PAGE).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), ram)]).unwrap();
    let scratch = Arc::new(Scratch::new().unwrap());
    Pages::new(Arc::new(memory), &scratch)
}

fn ranges(ranges: &[(u64, u64)]) -> Vec<PageRange> {
    let range = |&(page, pages): &(u64, u64)| PageRange {
        address: (page * PAGE).into(),
        length: (pages * PAGE).into(),
    };
    ranges.iter().map(range).collect()
}

/// Maps the first pages of a file with those of the guest: (first page, number).
fn shadow(pages: &Pages, file: &File, at: &[(u64, u64)], writable: bool) -> Result<Shadow, Errno> {
    let mapping = Mapping {
        fd: file.try_clone().unwrap().into(),
        offset: 0,
    };
    let length: u64 = at.iter().map(|(_, pages)| pages * PAGE).sum();
    Shadow::new(pages, &ranges(at), &mapping, length, writable)
}

fn guest(pages: &Pages, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    assert!(pages.memory.read(&mut bytes, GuestAddress(address)));
    bytes
}

fn write(pages: &Pages, address: u64, bytes: &[u8]) {
    pages.memory.write(bytes, GuestAddress(address));
}

fn content(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn scattered_pages_of_the_guest_show_the_object_in_order() {
    let (pages, file) = (pages(), object(4));
    for page in 0..4 {
        file.write_all_at(&[u8::try_from(page).unwrap() + 1; 4096], page * PAGE)
            .unwrap();
    }
    let shadow = shadow(&pages, &file, &[(9, 1), (3, 2), (60, 1)], true).unwrap();
    for (page, value) in [(9, 1), (3, 2), (4, 3), (60, 4)] {
        assert_eq!(guest(&pages, page * PAGE, 4096), [value; 4096], "{page}");
    }
    write(&pages, 4 * PAGE - 2, b"word");
    shadow.to_host();
    assert_eq!(content(&file, 2 * PAGE - 2, 4), b"word");
    file.write_all_at(b"pixel", 3 * PAGE - 3).unwrap();
    shadow.to_guest();
    assert_eq!(guest(&pages, 5 * PAGE - 3, 3), b"pix");
    assert_eq!(guest(&pages, 60 * PAGE, 3), b"el\x04");
}

#[test]
fn writers_of_neighbouring_bytes_on_both_sides_do_not_undo_each_other() {
    let (pages, file) = (pages(), object(1));
    let shadow = shadow(&pages, &file, &[(1, 1)], true).unwrap();
    for first_to_host in [true, false] {
        for byte in 0..8 {
            let at = PAGE + 100 + byte;
            match byte % 2 {
                0 => write(&pages, at, b"c"),
                _ => file.write_all_at(b"g", 100 + byte).unwrap(),
            }
        }
        match first_to_host {
            true => (shadow.to_host(), shadow.to_guest()),
            false => (shadow.to_guest(), shadow.to_host()),
        };
        assert_eq!(content(&file, 100, 8), b"cgcgcgcg");
        assert_eq!(guest(&pages, PAGE + 100, 8), b"cgcgcgcg");
        file.write_all_at(&[0; 8], 100).unwrap();
        shadow.to_guest();
        assert_eq!(guest(&pages, PAGE + 100, 8), [0; 8]);
    }
}

#[test]
fn many_separate_bytes_of_a_large_mapping_reach_the_object() {
    let (pages, file) = (pages(), object(40));
    let shadow = shadow(&pages, &file, &[(20, 40)], true).unwrap();
    let mut expected = vec![0; 40 * 4096];
    for (index, byte) in expected.iter_mut().enumerate() {
        *byte = u8::from(index % 2 == 1);
    }
    write(&pages, 20 * PAGE, &expected);
    shadow.to_host();
    assert!(content(&file, 0, expected.len()) == expected);
}

#[test]
fn two_mappings_of_an_object_see_each_others_writes_once_both_are_synchronized() {
    let (pages, file) = (pages(), object(1));
    let one = shadow(&pages, &file, &[(1, 1)], true).unwrap();
    let other = shadow(&pages, &file, &[(2, 1)], true).unwrap();
    write(&pages, PAGE, b"one");
    write(&pages, 2 * PAGE + 3, b"other");
    one.to_host();
    other.to_host();
    one.to_guest();
    other.to_guest();
    assert_eq!(guest(&pages, PAGE, 8), b"oneother");
    assert_eq!(guest(&pages, 2 * PAGE, 8), b"oneother");
}

#[test]
fn what_a_guest_writes_where_it_may_only_read_stays_in_the_guest() {
    let (pages, file) = (pages(), object(1));
    let shadow = shadow(&pages, &file, &[(1, 1)], false).unwrap();
    write(&pages, PAGE, b"guest");
    shadow.to_host();
    assert_eq!(content(&file, 0, 5), [0; 5]);
}

#[test]
fn pages_that_are_no_memory_of_the_guest_or_not_as_many_as_the_mapping_are_refused() {
    let (pages, file) = (pages(), object(4));
    let refused = |ranges: &[(u64, u64)], length: u64| {
        let range = |&(address, length): &(u64, u64)| PageRange {
            address: address.into(),
            length: length.into(),
        };
        let mapping = Mapping {
            fd: file.try_clone().unwrap().into(),
            offset: 0,
        };
        let ranges: Vec<_> = ranges.iter().map(range).collect();
        Shadow::new(&pages, &ranges, &mapping, length, true).err()
    };
    assert_eq!(refused(&[(0, PAGE)], PAGE), None);
    for (address, length) in [
        (RAM * PAGE, PAGE),
        ((RAM - 1) * PAGE, 2 * PAGE),
        (u64::MAX - PAGE + 1, PAGE),
        (0, 1 << 62),
    ] {
        let error = refused(&[(address, length)], length);
        assert_eq!(error, Some(Errno::EFAULT), "{address:#x}, {length:#x}");
    }
    for ranges in [
        &[][..],
        &[(0, 0), (0, 2 * PAGE)],
        &[(0, PAGE)],
        &[(0, PAGE), (PAGE, 2 * PAGE)],
        &[(1, 2 * PAGE)],
        &[(0, 2 * PAGE - 1), (0, 1)],
        &[(0, u64::MAX - PAGE + 1), (0, 3 * PAGE)],
    ] {
        assert_eq!(refused(ranges, 2 * PAGE), Some(Errno::EINVAL), "{ranges:?}");
    }
}

#[test]
fn an_object_whose_memory_goes_away_leaves_the_guest_what_it_saw_last() {
    for to_host in [true, false] {
        let (pages, file) = (pages(), object(2));
        file.write_all_at(b"seen", PAGE).unwrap();
        let shadow = shadow(&pages, &file, &[(1, 2)], true).unwrap();
        file.set_len(PAGE).unwrap();
        write(&pages, 2 * PAGE + 4, b"!");
        match to_host {
            true => shadow.to_host(),
            false => shadow.to_guest(),
        }
        assert_eq!(guest(&pages, 2 * PAGE, 5), b"seen!");
        assert!(shadow.copies().is_none());
        shadow.to_host();
        shadow.to_guest();
    }
}

#[test]
fn a_mapping_longer_than_its_object_is_refused_without_a_signal() {
    let (pages, file) = (pages(), object(1));
    let refused = shadow(&pages, &file, &[(1, 3)], true).err();
    assert_eq!(refused, Some(Errno::ENODEV));
}

#[test]
fn nothing_is_touched_once_a_mapping_has_ended_in_the_middle_of_a_copy() {
    let (pages, file) = (pages(), object(40));
    for _ in 0..20 {
        let shadow = shadow(&pages, &file, &[(20, 40)], true).unwrap();
        thread::scope(|scope| {
            let copies = scope.spawn(|| {
                for value in 0..100 {
                    file.write_all_at(&[value; 4096 * 40], 0).unwrap();
                    shadow.to_guest();
                }
            });
            thread::yield_now();
            shadow.end();
            let at_the_end = guest(&pages, 20 * PAGE, 40 * 4096);
            copies.join().unwrap();
            assert!(guest(&pages, 20 * PAGE, 40 * 4096) == at_the_end);
        });
        write(&pages, 20 * PAGE, b"after the end");
        shadow.to_host();
        assert_ne!(content(&file, 0, 13), b"after the end");
    }
}

#[test]
fn differences_are_exactly_the_bytes_that_differ() {
    let old = vec![7; 3 * 4096];
    let mut new = old.clone();
    let changed = [
        0..1,
        7..9,
        16..24,
        30..41,
        4088..4104,
        5000..5001,
        5002..5003,
        12280..12288,
    ];
    for range in &changed {
        new[range.clone()].fill(8);
    }
    // What is left of an earlier comparison does not count.
    let mut runs = vec![0..2, 3..4];
    differences(&new, &old, &mut runs);
    assert_eq!(runs, changed);
    differences(&old, &old, &mut runs);
    assert_eq!(runs, []);
}
