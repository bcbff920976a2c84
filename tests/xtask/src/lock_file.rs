//! No crate twice: holds `Cargo.lock` against the exceptions of `deny.toml`.
//!
//! `cargo deny check bans` says the same, but is a tool that not everybody has. `cargo xtask test` calls this.

use std::collections::BTreeMap;
use std::path::Path;

/// The crates that stand in the lock file in several versions, but for those that `deny.toml` excuses.
pub fn duplicates(workspace: &Path) -> std::io::Result<Vec<String>> {
    let lock = std::fs::read_to_string(workspace.join("Cargo.lock"))?;
    let deny = std::fs::read_to_string(workspace.join("deny.toml"))?;
    Ok(unexcused(&lock, &deny))
}

fn unexcused(lock: &str, deny: &str) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        let value = |key| {
            let value: &str = line.strip_prefix(key)?;
            Some(value.trim_matches('"'))
        };
        if let Some(found) = value("name = ") {
            name = found;
        } else if let Some(version) = value("version = ")
            && !deny.contains(&format!("\"{name}@{version}\""))
        {
            versions.entry(name).or_default().push(version);
        }
    }
    versions
        .into_iter()
        .filter(|(_, versions)| versions.len() > 1)
        .map(|(name, versions)| format!("{name} {}", versions.join(" and ")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = "version = 4\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\
        [[package]]\nname = \"a\"\nversion = \"2.0.0\"\n[[package]]\nname = \"b\"\nversion = \"1.0.0\"\n";

    #[test]
    fn a_crate_in_two_versions_is_found() {
        assert_eq!(unexcused(LOCK, ""), ["a 1.0.0 and 2.0.0"]);
    }

    #[test]
    fn an_excused_version_does_not_count() {
        let none: [&str; 0] = [];
        assert_eq!(unexcused(LOCK, "{ crate = \"a@1.0.0\" }"), none);
    }
}
