//! `cargo xtask trace FILE`: prints what `mini-vmm run --trace FILE` recorded, a line per request. For people who want to
//! know what a guest asked its GPU; the format is that of `TraceRecord` in `protocol/src/control.rs`.

use std::path::PathBuf;
use std::process::ExitCode;

use pvgpu_protocol::Errno;
use pvgpu_protocol::control::{TraceRecord, decode_trace};
use pvgpu_protocol::family;
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use zerocopy::FromBytes;

use crate::say::say;

/// Which trace.
#[derive(clap::Args)]
#[command(
    after_help = "Columns: when the request came, in microseconds since the machine's start; how long it took; its queue; \
operation; the file or object that it is about; result or error. Ioctls that several drivers number alike have all \
their names.\n\n\
Exit code 0: every record was read. 2: the file cannot be read, or ends within a record (a machine that was killed)."
)]
pub struct Arguments {
    /// What `mini-vmm run --trace FILE` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let path = arguments.file.display();
    let bytes = match std::fs::read(&arguments.file) {
        Ok(bytes) => bytes,
        Err(error) => {
            eprintln!(
                "cargo xtask trace: cannot read {path}: {error}; name a file that `mini-vmm run --trace FILE` wrote"
            );
            return ExitCode::from(2);
        }
    };
    say!(
        "{:>12} {:>12} {:>5}  {:38} {:>6}  result",
        "at us",
        "took us",
        "queue",
        "operation",
        "object"
    );
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let Ok((record, length)) = decode_trace(rest) else {
            let at = bytes.len() - rest.len();
            eprintln!(
                "cargo xtask trace: no whole record at byte {at} of {path}: was the machine killed, or is it no trace?"
            );
            return ExitCode::from(2);
        };
        say!("{}", line(&record));
        rest = &rest[length..];
    }
    ExitCode::SUCCESS
}

/// A record for people.
fn line(record: &TraceRecord) -> String {
    let (operation, object) = match RequestHeader::read_from_prefix(record.request) {
        Ok((header, body)) => (
            operation(header.operation.get(), body),
            header.object.get().to_string(),
        ),
        Err(_) => ("no request: shorter than a header".into(), "-".into()),
    };
    let result = match record.result {
        error if error < 0 => {
            let number = error.unsigned_abs();
            let known = i32::try_from(number).ok().map(Errno::new);
            let name = known.filter(|known| known.number().unsigned_abs() == number);
            match name.and_then(Errno::name) {
                Some(name) => name.to_owned(),
                None => format!("error {number}"),
            }
        }
        value => value.to_string(),
    };
    format!(
        "{:12.1} {:12.1} {:5}  {operation:38} {object:>6}  {result}",
        record.time_ns as f64 / 1e3,
        record.duration_ns as f64 / 1e3,
        record.queue
    )
}

/// The operation's name; an ioctl's own.
fn operation(number: u16, body: &[u8]) -> String {
    match (
        Operation::from_number(number),
        IoctlRequest::read_from_prefix(body),
    ) {
        (Some(Operation::Ioctl), Ok((ioctl, _))) => ioctl_names(ioctl.command.get()),
        (Some(operation), _) => operation.name().to_owned(),
        (None, _) => format!("operation {number}"),
    }
}

/// The names of the ioctls with that command: drivers number theirs alike.
fn ioctl_names(command: u32) -> String {
    let mut names = Vec::new();
    for ioctl in family::ALL.iter().flat_map(|family| family.ioctls) {
        let name = ioctl.name.trim_start_matches("DRM_IOCTL_");
        if ioctl.command == command && !names.contains(&name) {
            names.push(name);
        }
    }
    match names[..] {
        [] => format!("ioctl {command:#010x}"),
        _ => names.join(" or "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: Operation, body: &[u8]) -> Vec<u8> {
        let mut bytes = operation.number().to_le_bytes().to_vec();
        bytes.extend([0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(body);
        bytes
    }

    fn words(request: &[u8], result: i32) -> Vec<String> {
        let record = TraceRecord {
            time_ns: 1500,
            duration_ns: 2000,
            queue: 3,
            result,
            request,
        };
        let line = line(&record);
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_says_when_how_long_where_what_and_how_it_ended() {
        let close = request(Operation::Close, &[]);
        assert_eq!(words(&close, 0), ["1.5", "2.0", "3", "close", "7", "0"]);
        let gem_close = family::core::FAMILY
            .ioctls
            .iter()
            .find(|ioctl| ioctl.name == "DRM_IOCTL_GEM_CLOSE")
            .unwrap();
        let mut body = gem_close.command.to_le_bytes().to_vec();
        body.extend([0; 4]);
        let ioctl = request(Operation::Ioctl, &body);
        assert_eq!(
            words(&ioctl, -22),
            ["1.5", "2.0", "3", "GEM_CLOSE", "7", "EINVAL"]
        );
    }

    #[test]
    fn what_is_no_request_of_ours_has_a_line_too() {
        assert!(
            words(&[1, 2], -71)
                .join(" ")
                .contains("shorter than a header")
        );
        let unknown = request(Operation::Ioctl, &[1, 2, 3, 4, 0, 0, 0, 0]);
        assert!(words(&unknown, -25).contains(&"0x04030201".to_owned()));
        let mut strange = request(Operation::Nop, &[]);
        strange[0] = 99;
        assert!(
            words(&strange, i32::MIN)
                .join(" ")
                .ends_with("operation 99 7 error 2147483648")
        );
    }

    #[test]
    fn ioctls_of_several_drivers_with_one_command_have_all_their_names() {
        for ioctl in family::ALL.iter().flat_map(|family| family.ioctls) {
            let names = ioctl_names(ioctl.command);
            assert!(
                names.contains(ioctl.name.trim_start_matches("DRM_IOCTL_")),
                "{names}"
            );
        }
    }
}
