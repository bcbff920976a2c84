//! The documents tell the truth about the tree: what they name is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every document of the project with its path from the workspace's folder.
fn documents() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(workspace().join("docs")).unwrap();
    let mut paths: Vec<_> = docs
        .map(|entry| Path::new("docs").join(entry.unwrap().file_name()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    if workspace().join("README.md").exists() {
        paths.push("README.md".into());
    }
    let read = |path: PathBuf| {
        let text = fs::read_to_string(workspace().join(&path)).unwrap();
        (path, text)
    };
    paths.into_iter().map(read).collect()
}

/// The lines of a document outside of its fenced code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .filter_map(|line| {
            line.trim_start_matches('#')
                .strip_prefix(' ')
                .filter(|_| line.starts_with('#'))
        })
        .map(|heading| {
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.collect::<String>().to_lowercase().replace(' ', "-")
        })
        .collect()
}

/// The texts between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The cells of the rows of a document's tables.
fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    prose(text).filter_map(|line| {
        let row = line.strip_prefix("| ")?.strip_suffix(" |")?;
        Some(row.split(" | ").collect())
    })
}

#[test]
fn every_link_leads_somewhere() {
    let mut dead = Vec::new();
    for (path, text) in documents() {
        for link in prose(&text).flat_map(|line| line.split("](").skip(1)) {
            let Some((target, _)) = link.split_once(')') else {
                continue;
            };
            if target.starts_with("http") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => workspace().join(&path),
                file => workspace().join(&path).with_file_name("").join(file),
            };
            let found = match fs::read_to_string(&file) {
                _ if anchor.is_empty() => file.exists(),
                Ok(text) => anchors(&text).contains(anchor),
                Err(_) => false,
            };
            if !found {
                dead.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

#[test]
fn every_function_that_the_architecture_names_is_in_its_file() {
    let text = fs::read_to_string(workspace().join("docs/architecture.md")).unwrap();
    let mut checked = 0;
    for row in rows(&text) {
        let &[file, functions, _] = row.as_slice() else {
            continue;
        };
        let Some(file) = quoted(file).next().filter(|file| file.ends_with(".rs")) else {
            continue;
        };
        let source = fs::read_to_string(workspace().join(file))
            .unwrap_or_else(|error| panic!("architecture.md names {file}: {error}"));
        for function in quoted(functions) {
            let name = function.rsplit("::").next().unwrap_or(function);
            let there = [
                format!("fn {name}"),
                format!("static {name}"),
                format!("struct {name}"),
            ];
            assert!(
                there.iter().any(|definition| source.contains(definition)),
                "architecture.md names {function}, which is not in {file}"
            );
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} functions found in the tables");
}

/// The sources of all Rust files below a folder, one after the other.
fn sources(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            all += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all += &fs::read_to_string(&path).unwrap();
        }
    }
    all
}

#[test]
fn every_promise_of_the_threat_model_names_tests_that_exist() {
    let text = fs::read_to_string(workspace().join("docs/threat-model.md")).unwrap();
    let (_, promises) = text.split_once("\n## Promises\n").unwrap();
    let (promises, _) = promises.split_once("\n## Out of scope\n").unwrap();
    let folders = [
        "protocol",
        "guest-driver",
        "host-proxy",
        "mini-vmm",
        "tests",
    ];
    let source: String = folders
        .map(|folder| sources(&workspace().join(folder)))
        .concat();
    let mut checked = 0;
    for row in rows(promises) {
        let Some(held_by) = row.last().filter(|cell| cell.contains('`')) else {
            continue;
        };
        for test in quoted(held_by) {
            let there = match test.strip_prefix("fuzz ") {
                Some(target) => workspace()
                    .join(format!("tests/fuzz/fuzz_targets/{target}.rs"))
                    .exists(),
                None => {
                    source.contains(&format!("#[test]\n    fn {test}("))
                        || source.contains(&format!("#[test]\nfn {test}("))
                        || source.contains(&format!("name: \"{test}\""))
                }
            };
            assert!(there, "the threat model names {test}, which is no test");
            checked += 1;
        }
    }
    assert!(checked > 40, "only {checked} tests found in the tables");
    // Each row of a promise ends with its tests.
    for row in rows(promises) {
        let heading =
            row.last() == Some(&"held by") || row.iter().all(|cell| cell.starts_with("---"));
        assert!(
            heading || row.last().is_some_and(|cell| cell.contains('`')),
            "no test holds this promise: {}",
            row.join(" | ")
        );
    }
}

/// The messages that the sources below a folder can log, each with its target and level.
fn messages(folder: &Path, target: &str, found: &mut BTreeSet<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let target = match stem {
            "lib" | "mod" => target.to_owned(),
            "main" => "mini_vmm".to_owned(),
            program if folder.ends_with("bin") => program.replace('-', "_"),
            stem => format!("{target}::{stem}"),
        };
        if path.is_dir() {
            messages(&path, &target, found);
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        for level in ["error", "warn", "info", "debug", "trace"] {
            let calls = source.matches(&format!("log::{level}!(")).count();
            let mut limited = source.split("guest_log!(").skip(1);
            let limited = limited.any(|call| call.trim_start().starts_with(&format!("{level},")));
            if calls > 0 || limited {
                found.insert((target.clone(), level.to_owned()));
            }
        }
    }
}

#[test]
fn every_log_target_and_level_is_listed_and_no_other() {
    let mut found = BTreeSet::new();
    for (folder, crate_name) in [
        ("host-proxy", "pvgpu_host_proxy"),
        ("mini-vmm", "pvgpu_mini_vmm"),
    ] {
        messages(
            &workspace().join(folder).join("src"),
            crate_name,
            &mut found,
        );
    }
    assert!(found.len() > 10, "{found:?}");
    // A line about others, which the macro does not write.
    found.insert(("pvgpu_host_proxy::logging".into(), "warn".into()));
    let text = fs::read_to_string(workspace().join("docs/operations.md")).unwrap();
    let (_, text) = text.split_once("\n## Messages\n").unwrap();
    let mut target = String::new();
    let mut listed = BTreeSet::new();
    for row in prose(text).filter_map(|line| line.strip_prefix('|')) {
        let mut cells = row.split('|').map(str::trim);
        let (first, level) = (cells.next().unwrap(), cells.next().unwrap());
        if let Some(name) = quoted(first).next() {
            target = name.to_owned();
        }
        if !target.is_empty() {
            listed.insert((target.clone(), level.to_owned()));
        }
    }
    assert_eq!(found, listed, "logged, then listed in docs/operations.md");
}

#[test]
fn every_module_that_may_be_unsafe_is_listed_and_no_other() {
    fn visit(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && fs::read_to_string(&path)
                    .unwrap()
                    .contains("allow(unsafe_code)")
            {
                let path = path.strip_prefix(workspace()).unwrap();
                found.insert(path.display().to_string());
            }
        }
    }
    let mut found = BTreeSet::new();
    for folder in [
        "protocol",
        "guest-driver",
        "guest-driver/linux",
        "host-proxy",
        "mini-vmm",
    ] {
        visit(&workspace().join(folder).join("src"), &mut found);
    }
    let text = fs::read_to_string(workspace().join("docs/architecture.md")).unwrap();
    let listed = rows(&text)
        .filter(|row| row.len() == 2)
        .filter_map(|row| Some(quoted(row[0]).next()?.to_string()))
        .filter(|module| module.ends_with(".rs"))
        .collect();
    assert_eq!(
        found, listed,
        "modules with unsafe code, then those in docs/architecture.md"
    );
}
