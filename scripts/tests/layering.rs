//! Which crate may depend on which (see ARCHITECTURE.md), checked against normal and build dependencies from cargo
//! metadata.

use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// Normal and build dependencies by package.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let args = ["metadata", "--format-version", "1", "--no-deps", "--locked"];
    let out =
        Command::new(cargo).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let text = |v: &Value| v.as_str().expect("a name").to_string();
    packages
        .iter()
        .map(|p| {
            let all = p["dependencies"].as_array().expect("dependencies").iter();
            let shipped = all.filter(|d| d["kind"].as_str() != Some("dev")).map(|d| text(&d["name"]));
            (text(&p["name"]), shipped.collect())
        })
        .collect()
}

/// The rule of one package: the crates that it may depend on.
fn allowed(package: &str) -> &'static [&'static str] {
    match package {
        "tap-host" => &["smallvec", "thiserror", "zerocopy"],
        "tap-conformance" => &["tap-host"],
        "tap-linux" => {
            &["tap-host", "tap-abi", "io-uring", "libc", "rustix", "smallvec", "thiserror", "tokio"]
        }
        "tap-abi" => &["zerocopy"],
        "tap-core" => &["tap-host", "smallvec", "thiserror"],
        "tap-images" => {
            &["tap-host", "tap-core", "smallvec", "thiserror", "zerocopy", "flate2", "futures-util"]
        }
        "tap-example" => &["tap-host", "tap-core", "tap-images"],
        "tap-mason" => {
            &["tap-host", "tap-core", "tap-images", "annotate-snippets", "futures-util", "sha2", "thiserror"]
        }
        "tap-ring" => &["tap-host", "tap-abi", "tap-core", "smallvec", "thiserror", "zerocopy"],
        "tap-nbd" => &[
            "tap-host",
            "tap-abi",
            "tap-core",
            "smallvec",
            "thiserror",
            "zerocopy",
            "futures-util",
            "rustls",
        ],
        "tap-control" => &["tap-host", "tap-abi", "tap-core", "serde", "serde_json", "thiserror", "zerocopy"],
        "tap-xenbus" => &["tap-host", "tap-abi", "tap-core", "tap-ring", "thiserror"],
        "tap-programs" => &[
            "tap-host",
            "tap-abi",
            "tap-control",
            "tap-core",
            "tap-images",
            "tap-mason",
            "tap-nbd",
            "tap-ring",
            "tap-xenbus",
            "clap",
            "futures-util",
            "rustls",
            "serde",
            "serde_json",
            "smallvec",
            "thiserror",
        ],
        "tapdisk" => &["tap-linux", "tap-programs", "indicatif"],
        "sim" => &["madsim"],
        "xen-model" => &["sim", "tap-host", "tap-abi", "zerocopy"],
        "kernel-model" => &["sim", "tap-host", "tap-abi", "xen-model", "smallvec"],
        "scripts" => &["xshell", "seccompiler", "serde_json", "serde", "syn", "proc-macro2", "toml"],
        other => panic!("{other} has no rule yet: add it here and to ARCHITECTURE.md"),
    }
}

#[test]
fn nobody_knows_more_than_the_rules_allow() {
    let all = dependencies();
    assert!(all.len() >= 14, "only {} packages", all.len());
    for (package, depends_on) in all.iter().filter(|(p, _)| *p != "scenarios") {
        let allowed = allowed(package);
        for other in depends_on {
            assert!(allowed.contains(&other.as_str()), "{package} must not depend on {other}");
        }
    }
}

#[test]
fn nothing_in_the_drivers_means_simulated() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../drivers");
    let mut folders = vec![std::path::PathBuf::from(root)];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in
            std::fs::read_dir(&folder).expect("drivers is there").map(|e| e.expect("an entry").path())
        {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                seen += 1;
                let text = std::fs::read_to_string(&entry).expect("source is text");
                for word in ["cfg(madsim", "cfg(feature", "cfg(sim"] {
                    assert!(
                        !text.contains(word),
                        "{} has {word}...): real or simulated is a type",
                        entry.display()
                    );
                }
            }
        }
    }
    assert!(seen > 10, "only {seen} files");
}
