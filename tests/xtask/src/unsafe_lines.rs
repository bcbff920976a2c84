//! `cargo xtask unsafe`: counts the lines of unsafe code and holds them against `tests/xtask/unsafe.txt`, so that whoever
//! adds one sees it and says why. A step of `cargo xtask test` calls it.
//!
//! A line counts if it has code within an unsafe block, function, impl, trait or extern block, its head and last brace
//! included. A parser of Rust would not see what stands in the arguments of a macro (`assert_eq!(unsafe { .. }, 0)`), so
//! this reads tokens. It changes nothing but that file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::say::say;

/// Where the numbers stand, from the workspace's folder.
const RECORD: &str = "tests/xtask/unsafe.txt";

/// What to do about it.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code 0: the numbers are those of the file. 1: they are not. 2: a file cannot be read or written."
)]
pub struct Arguments {
    /// Write the numbers into tests/xtask/unsafe.txt
    #[arg(long)]
    write: bool,
}

/// Why the numbers are not those of the file, or are not known.
#[derive(Debug, thiserror::Error)]
pub enum UnsafeError {
    /// There are others.
    #[error(
        "{0}; the number only falls: find a way without `unsafe`, or use a module that has it, and only then run \
        `cargo xtask unsafe --write` and say in the commit message why it must be; after less, run it as well"
    )]
    Differs(String),
    /// A file cannot be read or written.
    #[error("cannot use {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
}

/// Lines of unsafe code by file, from the workspace's folder; only files that have any.
type Counts = BTreeMap<String, usize>;

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let result = match arguments.write {
        true => count(&workspace).and_then(|counts| {
            let path = workspace.join(RECORD);
            fs::write(&path, record(&counts)).map_err(|source| UnsafeError::File { path, source })
        }),
        false => check(&workspace),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask unsafe: {error}");
            ExitCode::from(if matches!(error, UnsafeError::Differs(_)) {
                1
            } else {
                2
            })
        }
    }
}

/// Prints the number of each crate, and fails if a file has more or less than was recorded.
pub fn check(workspace: &Path) -> Result<(), UnsafeError> {
    let counts = count(workspace)?;
    let path = workspace.join(RECORD);
    let recorded =
        fs::read_to_string(&path).map_err(|source| UnsafeError::File { path, source })?;
    let mut crates: BTreeMap<&str, usize> = BTreeMap::new();
    for (file, lines) in &counts {
        *crates.entry(crate_of(file)).or_default() += lines;
    }
    for (name, lines) in crates {
        say!("{lines:5} {name}");
    }
    let differences = differences(&counts, &recorded);
    match differences.is_empty() {
        true => Ok(()),
        false => Err(UnsafeError::Differs(differences.join(", "))),
    }
}

/// What differs from the record, a sentence for each file.
fn differences(counts: &Counts, recorded: &str) -> Vec<String> {
    let lines = recorded
        .lines()
        .filter_map(|line| line.trim_start().split_once(' '));
    let recorded: Counts = lines
        .filter_map(|(lines, file)| Some((file.to_owned(), lines.parse().ok()?)))
        .collect();
    let files: BTreeSet<&String> = counts.keys().chain(recorded.keys()).collect();
    let of = |counts: &Counts, file| counts.get(file).copied().unwrap_or_default();
    files
        .into_iter()
        .map(|file| (file, of(counts, file), of(&recorded, file)))
        .filter(|(_, now, before)| now != before)
        .map(|(file, now, before)| {
            format!("{file} has {now} lines of unsafe code where {before} are recorded")
        })
        .collect()
}

/// The record's text.
fn record(counts: &Counts) -> String {
    let lines = counts
        .iter()
        .map(|(file, lines)| format!("{lines:4} {file}\n"));
    lines.collect()
}

/// The folder of the crate that a file belongs to.
fn crate_of(file: &str) -> &str {
    let ends = [
        "/src/",
        "/tests/",
        "/benches/",
        "/fuzz_targets/",
        "/build.rs",
    ];
    // The folder `tests` has crates in it: what counts is the last one.
    let end = ends.iter().filter_map(|end| file.rfind(end)).max();
    end.map_or(file, |end| &file[..end])
}

fn count(workspace: &Path) -> Result<Counts, UnsafeError> {
    let mut counts = Counts::new();
    visit(workspace, "", &mut counts)?;
    Ok(counts)
}

/// Counts in the folder `name`, a path from the workspace's folder.
fn visit(workspace: &Path, name: &str, counts: &mut Counts) -> Result<(), UnsafeError> {
    let folder = workspace.join(name);
    let error = |path: &Path| {
        let path = path.to_owned();
        |source| UnsafeError::File { path, source }
    };
    for entry in fs::read_dir(&folder).map_err(error(&folder))? {
        let entry = entry.map_err(error(&folder))?;
        let path = entry.path();
        let file = entry.file_name().to_string_lossy().into_owned();
        let inside = match name {
            "" => file.clone(),
            name => format!("{name}/{file}"),
        };
        if entry.file_type().map_err(error(&path))?.is_dir() {
            // What was built or fetched, and what is no part of the sources.
            if !["target", "build", "corpus", "artifacts"].contains(&file.as_str())
                && !file.starts_with('.')
            {
                visit(workspace, &inside, counts)?;
            }
        } else if file.ends_with(".rs") {
            let source = fs::read_to_string(&path).map_err(error(&path))?;
            let lines = unsafe_lines(&source).len();
            if lines > 0 {
                counts.insert(inside, lines);
            }
        }
    }
    Ok(())
}

/// A piece of code, without comments.
#[derive(Debug, PartialEq, Eq)]
enum Token<'a> {
    /// A keyword, a name or a number.
    Word(&'a str),
    /// A string or a character.
    Text,
    /// Anything else.
    Mark(char),
}

/// The lines of unsafe code.
fn unsafe_lines(source: &str) -> BTreeSet<usize> {
    let tokens = tokens(source);
    let mut lines = BTreeSet::new();
    for (at, (line, token)) in tokens.iter().enumerate() {
        if *token == Token::Word("unsafe") {
            lines.insert(*line);
            let length = region(tokens[at + 1..].iter().map(|(_, token)| token));
            lines.extend(tokens[at + 1..].iter().take(length).map(|(line, _)| *line));
        }
    }
    lines
}

/// How many tokens after `unsafe` belong to it: up to the brace that closes its block, or nothing where it has none (an
/// attribute, a type, a function that is only declared).
fn region<'a>(tokens: impl Iterator<Item = &'a Token<'a>>) -> usize {
    let (mut depth, mut block, mut after_fn) = (0usize, false, false);
    for (token, at) in tokens.zip(1..) {
        match token {
            // `unsafe extern "C" fn(u32)`: a type.
            Token::Mark('(') if after_fn => return 0,
            Token::Mark(open @ ('(' | '[' | '{')) => {
                block |= depth == 0 && *open == '{';
                depth += 1;
            }
            Token::Mark(')' | ']' | '}') if depth == 0 => return 0,
            Token::Mark(')' | ']' | '}') => {
                depth -= 1;
                if depth == 0 && block {
                    return at;
                }
            }
            Token::Mark(';') if depth == 0 => return 0,
            _ => (),
        }
        after_fn = *token == Token::Word("fn");
    }
    0
}

/// All tokens with their lines; a text of several lines is there once for each.
fn tokens(source: &str) -> Vec<(usize, Token<'_>)> {
    let mut tokens = Vec::new();
    let (mut rest, mut line) = (source, 1);
    while let Some(first) = rest.chars().next() {
        let (length, token) = next(rest, first);
        let (text, after) = rest.split_at(length);
        let lines = text.matches('\n').count();
        match token {
            Some(Token::Text) => {
                tokens.extend((line..=line + lines).map(|line| (line, Token::Text)))
            }
            Some(token) => tokens.push((line, token)),
            None => (),
        }
        line += lines;
        rest = after;
    }
    tokens
}

/// The length of what `rest` begins with, in bytes, and what it is; `None` for comments, blanks and the quote of a lifetime.
fn next(rest: &str, first: char) -> (usize, Option<Token<'_>>) {
    let until = |end: &str, from: usize| {
        rest[from..]
            .find(end)
            .map_or(rest.len(), |at| from + at + end.len())
    };
    let word = |c: char| c.is_alphanumeric() || c == '_';
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), None);
    }
    if rest.starts_with("/*") {
        return (comment(rest), None);
    }
    let prefix = rest.find(|c| !word(c)).unwrap_or(rest.len());
    if let "r" | "br" | "cr" = &rest[..prefix] {
        let text = rest[prefix..].trim_start_matches('#');
        let hashes = rest.len() - prefix - text.len();
        if text.starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            return (until(&end, prefix + hashes + 1), Some(Token::Text));
        }
    }
    match first {
        '"' => (quoted(rest, '"'), Some(Token::Text)),
        '\'' => {
            let mut characters = rest.chars().skip(1);
            let literal = characters.next() == Some('\\') || characters.next() == Some('\'');
            match literal {
                true => (quoted(rest, '\''), Some(Token::Text)),
                false => (1, None),
            }
        }
        first if word(first) => (prefix, Some(Token::Word(&rest[..prefix]))),
        first => {
            let token = (!first.is_whitespace()).then_some(Token::Mark(first));
            (first.len_utf8(), token)
        }
    }
}

/// The length of a comment that begins with `/*` and may have others in it.
fn comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let step = match &rest.as_bytes()[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                2
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of a text that begins and ends with `quote`.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => (),
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(source: &str) -> Vec<usize> {
        unsafe_lines(source).into_iter().collect()
    }

    #[test]
    fn blocks_functions_and_impls_count_from_their_keyword_to_their_last_brace() {
        assert_eq!(lines("fn f() {\n    unsafe { g() };\n    h();\n}\n"), [2]);
        assert_eq!(
            lines("let x = unsafe {\n    f({ 1 })\n};\nlet y = 2;"),
            [1, 2, 3]
        );
        assert_eq!(
            lines(
                "unsafe fn f<'a, T>(\n    x: [u8; 4],\n) -> u8\nwhere\n    T: A,\n{\n    x[0]\n}\nfn g() {}"
            ),
            [1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(
            lines("unsafe impl<A, B> Send for C<A, B> {}\nfn g() {}"),
            [1]
        );
        assert_eq!(lines("assert_eq!(\n    unsafe { f() },\n    0\n);"), [2]);
        assert_eq!(lines("unsafe {\n    unsafe { f() }\n}"), [1, 2, 3]);
    }

    #[test]
    fn comments_and_blank_lines_in_unsafe_code_do_not_count() {
        assert_eq!(
            lines("unsafe {\n    // SAFETY: it is.\n\n    /* and\n    so */\n    f()\n}"),
            [1, 6, 7]
        );
    }

    #[test]
    fn what_only_looks_like_unsafe_code_does_not_count() {
        for source in [
            "//! unsafe {\n/* /* unsafe */ unsafe { */\n#![allow(unsafe_code)]\nfn f() {}",
            "let a = \"unsafe { \\\" unsafe {\";\nlet b = r#\"unsafe {\"#;\nlet c = b'\"';",
        ] {
            assert!(lines(source).is_empty(), "{source}");
        }
    }

    #[test]
    fn an_attribute_a_type_and_a_declaration_count_for_their_own_line() {
        assert_eq!(lines("#[unsafe(no_mangle)]\nfn f() {\n}\n"), [1]);
        assert_eq!(
            lines("struct S {\n    f: unsafe extern \"C\" fn(u32),\n    g: u32,\n}"),
            [2]
        );
        assert_eq!(
            lines("trait T {\n    unsafe fn f(a: [u8; 2]);\n    fn g() {\n    }\n}"),
            [2]
        );
    }

    #[test]
    fn braces_in_texts_and_characters_and_lifetimes_confuse_nobody() {
        assert_eq!(
            lines("unsafe {\n    f::<'static>('}', \"}\", b'\\'')\n}\ng();"),
            [1, 2, 3]
        );
        assert_eq!(lines("unsafe { asm!(\"a\n b\") }\nf();"), [1, 2]);
    }

    #[test]
    fn more_and_less_than_recorded_is_told_and_the_same_is_not() {
        let counts = Counts::from([("a/src/x.rs".into(), 2), ("b/src/y.rs".into(), 3)]);
        let none: [&str; 0] = [];
        assert_eq!(differences(&counts, &record(&counts)), none);
        let found = differences(
            &counts,
            "   1 a/src/x.rs\n   3 b/src/y.rs\n   5 b/src/gone.rs\n",
        );
        assert_eq!(
            found,
            [
                "a/src/x.rs has 2 lines of unsafe code where 1 are recorded",
                "b/src/gone.rs has 0 lines of unsafe code where 5 are recorded"
            ]
        );
    }

    #[test]
    fn a_file_belongs_to_the_folder_that_has_its_sources() {
        assert_eq!(
            crate_of("guest-driver/linux/src/entry.rs"),
            "guest-driver/linux"
        );
        assert_eq!(crate_of("tests/e2e/src/a/b.rs"), "tests/e2e");
        assert_eq!(crate_of("mini-vmm/tests/kernels/mod.rs"), "mini-vmm");
    }
}
