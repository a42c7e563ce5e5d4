//! Generates `docs/troubleshooting.md` from the table of findings. A test compares it with the committed page or updates it.

use std::fmt::Write;
use std::path::Path;

use super::findings::{ENTRIES, Kind};

/// Text that only the troubleshooting page has. It is compiled only for tests, so that the library does not contain it.
#[derive(Debug)]
pub(super) struct Entry {
    /// Kind of the finding.
    pub(super) kind: &'static Kind,
    /// Symptom. Empty: the finding reports no fault.
    pub(super) symptom: &'static str,
    /// Cause of the symptom.
    pub(super) cause: &'static str,
}

/// The troubleshooting page.
fn page() -> String {
    let mut page = String::from(
        "# Troubleshooting\n\n\
         Transparent proxying fails silently: packets are lost without an error message. `tproxyctl check` (or `tp_check`) \
         inspects the host and reports each fault with an id. This page lists every id with its symptom, its cause, its effect \
         on traffic, and the command that fixes it. The check replaces words in braces by values of the host.\n\n\
         `tproxyctl self-test` sends probes through a configuration in a temporary network namespace, and reports the last \
         netfilter hook that saw a lost probe.\n\n\
         <!-- Generated from src/check/findings.rs; `UPDATE_DOCS=1 cargo test --lib troubleshooting` regenerates it. -->\n\n\
         | symptom | finding |\n|---|---|\n",
    );
    let troubles = || ENTRIES.iter().filter(|entry| !entry.symptom.is_empty());
    for Entry { kind, symptom, .. } in troubles() {
        // Writing to a String does not fail.
        let _ = writeln!(page, "| {symptom} | [{}](#{}) |", kind.id, kind.id.replace('.', ""));
    }
    for Entry { kind: Kind { id, impact, fix }, symptom, cause } in troubles() {
        let _ = write!(page, "\n## {id}\n\n{symptom}.\n\n* Cause: {cause}\n* Effect: {impact}\n");
        let _ = match fix {
            &"" => writeln!(page, "* Fix: no command. The message of the finding has the details."),
            fix => writeln!(page, "* Fix: `{fix}`"),
        };
    }
    page.push_str("\n## Findings that report no fault\n\n| finding | meaning |\n|---|---|\n");
    for Entry { kind, cause, .. } in ENTRIES.iter().filter(|entry| entry.symptom.is_empty()) {
        let _ = writeln!(page, "| {} | {cause} {} |", kind.id, kind.impact);
    }
    page
}

#[test]
fn troubleshooting_page_matches_findings() {
    let page = page();
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/troubleshooting.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(committed.parent().unwrap()).unwrap();
        std::fs::write(&committed, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        committed == page,
        "docs/troubleshooting.md differs from src/check/findings.rs; `UPDATE_DOCS=1 cargo test --lib troubleshooting` \
         regenerates it"
    );
}

#[test]
fn findings_have_unique_ids_and_complete_texts() {
    let mut seen = std::collections::BTreeSet::new();
    for Entry { kind, symptom, cause } in ENTRIES {
        assert!(seen.insert(kind.id), "two findings have the id {}", kind.id);
        assert!(
            kind.id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._".contains(&b)),
            "{}",
            kind.id
        );
        let bare: String = kind.fix.split('\'').step_by(2).collect();
        assert!(
            !bare.contains(['<', '>', '|', ';', '$', '`', '*', '(']),
            "a shell would interpret a character of {}",
            kind.fix
        );
        for text in [*cause, kind.impact] {
            assert!(text.ends_with('.'), "{}: {text:?}", kind.id);
        }
        assert!(!symptom.ends_with('.') && (!symptom.is_empty() || kind.fix.is_empty()), "{}", kind.id);
    }
}
