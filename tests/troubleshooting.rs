//! `docs/troubleshooting.md` is generated from the table of findings.

use std::path::Path;

use tproxy::check::Entry;

#[test]
fn troubleshooting_page_equals_findings() {
    let page = tproxy::check::page();
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/troubleshooting.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(committed.parent().unwrap()).unwrap();
        std::fs::write(&committed, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        committed == page,
        "docs/troubleshooting.md differs from src/check/findings.rs; `UPDATE_DOCS=1 cargo test --test troubleshooting` \
         regenerates it"
    );
}

#[test]
fn findings_have_unique_ids_and_full_sentences() {
    let mut seen = std::collections::BTreeSet::new();
    for Entry { kind, symptom, cause } in tproxy::check::ENTRIES {
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
