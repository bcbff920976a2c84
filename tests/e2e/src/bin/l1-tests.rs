//! `l1-tests`: runs the testbed's tests; `l1-init` starts it inside L1, and people in `--shell`.

use std::io;
use std::process::ExitCode;

use pvgpu_e2e::{testbed, triple_fault};

fn usage() -> ExitCode {
    eprintln!(
        "usage: l1-tests [--keep-going] [--filter TEXT] [--claims FOLDER] [--over vhost-user|vhost-user-without-aperture] [--patience N] [--list]"
    );
    ExitCode::from(2)
}

fn main() -> ExitCode {
    let mut selection = testbed::Selection::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.len()) {
            ("--keep-going", _) => selection.keep_going = true,
            ("--filter", 1..) => selection.filter = arguments.next().unwrap_or_default(),
            ("--claims", 1..) => selection.claims = arguments.next().map(Into::into),
            ("--over", 1..) => match arguments.next().unwrap_or_default().parse() {
                Ok(over) => testbed::over::set(over),
                Err(()) => return usage(),
            },
            ("--patience", 1..) => match arguments.next().unwrap_or_default().parse() {
                Ok(times) => testbed::set_patience(times),
                Err(_) => return usage(),
            },
            ("--list", _) => {
                testbed::tests()
                    .iter()
                    .for_each(|test| println!("{}", test.name));
                return ExitCode::SUCCESS;
            }
            _ => return usage(),
        }
    }
    if let Err(error) = triple_fault::watch() {
        eprintln!("l1-tests: a triple fault will not be explained: {error}");
    }
    let passed = testbed::run(&testbed::tests(), &selection, &mut io::stdout().lock());
    match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            if let Ok(Some(events)) = triple_fault::before(60) {
                println!("what KVM did before a guest's triple fault:\n{events}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("l1-tests: cannot write the results: {error}");
            ExitCode::from(2)
        }
    }
}
