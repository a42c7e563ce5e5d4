//! `docs/troubleshooting.md`, made of the table of findings: a test compares it with the committed page, or writes it.

use std::fmt::Write;
use std::path::Path;

use super::findings::{ENTRIES, Kind};

/// What the troubleshooting page says of a kind; no finding does, and so a library without the page has none of it.
#[derive(Debug)]
pub(super) struct Entry {
    /// Which kind.
    pub(super) kind: &'static Kind,
    /// What people see. Empty: it is no trouble, and has no place among those that are.
    pub(super) symptom: &'static str,
    /// What is the matter.
    pub(super) cause: &'static str,
}

/// The troubleshooting page.
fn page() -> String {
    let mut page = String::from(
        "# Troubleshooting\n\n\
         Transparent proxying fails silently: packets vanish and nothing says why. `tproxyctl check` (or `tp_check`) looks \
         at the kernel and names what is wrong by an id. This page has every id: what people see, what is the matter, what it \
         does to traffic, and the command that cures it. Words in braces stand for what the check fills in.\n\n\
         `tproxyctl self-test` sends probes through a configuration in a network of its own, and says at which hook \
         a lost one was last seen.\n\n\
         <!-- Generated from src/check/findings.rs; `UPDATE_DOCS=1 cargo test --lib troubleshooting` writes it anew. -->\n\n\
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
            &"" => writeln!(page, "* Fix: no command; the finding says what is known."),
            fix => writeln!(page, "* Fix: `{fix}`"),
        };
    }
    page.push_str("\n## HostState that are no trouble\n\n| finding | what it says |\n|---|---|\n");
    for Entry { kind, cause, .. } in ENTRIES.iter().filter(|entry| entry.symptom.is_empty()) {
        let _ = writeln!(page, "| {} | {cause} {} |", kind.id, kind.impact);
    }
    page
}

#[test]
fn the_committed_page_is_what_the_findings_say() {
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
         writes it anew"
    );
}

#[test]
fn every_finding_has_an_id_of_its_own_and_says_what_it_does() {
    let mut seen = std::collections::BTreeSet::new();
    for Entry { kind, symptom, cause } in ENTRIES {
        assert!(seen.insert(kind.id), "{} is there twice", kind.id);
        assert!(
            kind.id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._".contains(&b)),
            "{}",
            kind.id
        );
        let bare: String = kind.fix.split('\'').step_by(2).collect();
        assert!(!bare.contains(['<', '>', '|', ';', '$', '`', '*', '(']), "a shell would misread {}", kind.fix);
        for text in [*cause, kind.impact] {
            assert!(text.ends_with('.'), "{}: {text:?}", kind.id);
        }
        assert!(!symptom.ends_with('.') && (!symptom.is_empty() || kind.fix.is_empty()), "{}", kind.id);
    }
}
