//! Compares the C structs of `docs/soft-gpu.md` with the Rust structs that they describe: a C file made of the page's
//! code, full of `_Static_assert`, must compile.

use pvgpu_protocol::family::soft;
use pvgpu_protocol::schema::Struct;
use std::fmt::Write;
use std::io::Write as _;
use std::mem::offset_of;
use std::process::{Command, Stdio};

const PAGE: &str = include_str!("../../docs/soft-gpu.md");

/// The code of the page.
fn code() -> String {
    let mut code = "#include <linux/types.h>\n#include <stddef.h>\n".to_owned();
    for block in PAGE.split("```c\n").skip(1) {
        code += block.split("```").next().unwrap();
    }
    code
}

fn equal(source: &mut String, expression: &str, value: usize) {
    writeln!(
        source,
        "_Static_assert({expression} == {value}, \"{expression} is {value}\");"
    )
    .unwrap();
}

/// Asserts the size and the offsets of a struct, named by fields in Rust and in C.
fn check(source: &mut String, name: &str, size: usize, fields: &[(&str, usize)]) {
    equal(source, &format!("sizeof(struct {name})"), size);
    for (field, offset) in fields {
        equal(
            source,
            &format!("offsetof(struct {name}, {field})"),
            *offset,
        );
    }
}

fn check_schema(source: &mut String, schema: &Struct) {
    let fields = schema.fields.iter();
    let fields: Vec<_> = fields
        .map(|field| (field.name, field.offset.into()))
        .collect();
    check(source, schema.name, schema.size.into(), &fields);
}

fn compiles(source: &str) -> bool {
    let mut compiler = Command::new("cc")
        .args(["-xc", "-fsyntax-only", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("no C compiler: install gcc");
    compiler
        .stdin
        .take()
        .unwrap()
        .write_all(source.as_bytes())
        .unwrap();
    compiler.wait().unwrap().success()
}

macro_rules! check_command {
    ($source:expr, $name:literal, $type:ident { $($field:ident),* }) => {
        let fields = [$((stringify!($field), offset_of!(soft::$type, $field))),*];
        check($source, $name, size_of::<soft::$type>(), &fields);
    };
}

#[test]
fn the_pages_structs_are_those_of_the_interface() {
    let mut source = code();
    for ioctl in soft::FAMILY.ioctls {
        check_schema(&mut source, ioctl.argument);
    }
    check_schema(&mut source, soft::Sync::SCHEMA);
    let asserts = &mut source;
    check_command!(
        asserts,
        "soft_header",
        Header {
            opcode,
            flags,
            size
        }
    );
    check_command!(
        asserts,
        "soft_surface",
        Surface {
            buffer,
            stride,
            offset,
            width,
            height
        }
    );
    check_command!(
        asserts,
        "soft_rectangle",
        Rectangle {
            x,
            y,
            width,
            height
        }
    );
    check_command!(
        asserts,
        "soft_fill",
        Fill {
            header,
            target,
            rectangle,
            color,
            pad
        }
    );
    check_command!(
        asserts,
        "soft_copy",
        CopyBytes {
            header,
            source,
            target,
            source_offset,
            target_offset,
            length
        }
    );
    check_command!(
        asserts,
        "soft_blit",
        Blit {
            header,
            source,
            target,
            source_rectangle,
            target_rectangle
        }
    );
    check_command!(
        asserts,
        "soft_path",
        Path {
            header,
            target,
            verb_count,
            point_count,
            stop_count,
            paint,
            spread,
            radius,
            color,
            start,
            end,
            transform
        }
    );
    check_command!(asserts, "soft_stop", Stop { offset, color });
    check_command!(
        asserts,
        "soft_matrix",
        Matrix {
            buffer,
            stride,
            offset
        }
    );
    check_command!(
        asserts,
        "soft_matmul",
        MatMul {
            header,
            a,
            b,
            c,
            m,
            k,
            n,
            pad
        }
    );
    check_command!(
        asserts,
        "soft_store",
        Store {
            header,
            buffer,
            value,
            offset
        }
    );
    check_command!(asserts, "soft_hang", Hang { header });
    assert!(compiles(&source));
}

#[test]
fn a_struct_that_differs_from_the_interface_is_noticed() {
    let mut source = code();
    check(&mut source, "soft_store", 24, &[("value", 8)]);
    assert!(!compiles(&source));
}
