//! `tp_check`, with Rust's types.

use std::ffi::CStr;

use tproxy::ffi::*;

use super::{Net, checked, eventually};

/// A finding of `tp_check`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub severity: u32,
    pub id: String,
    pub message: String,
    pub impact: String,
    pub fix: String,
}

/// A callback that appends findings to the context, a `Vec<Found>`.
pub unsafe extern "C" fn take(finding: *const tp_finding, context: *mut std::ffi::c_void) {
    // SAFETY: the texts of the finding are valid during the call; the caller gave such a context.
    unsafe {
        let text = |text| CStr::from_ptr(text).to_str().unwrap().to_owned();
        let tp_finding { severity, id, message, impact, fix } = *finding;
        let found = Found { severity, id: text(id), message: text(message), impact: text(impact), fix: text(fix) };
        (*context.cast::<Vec<Found>>()).push(found);
    }
}

/// Calls `tp_check` in this thread's namespace.
pub fn check() -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    // SAFETY: the callback takes such a context.
    let failures = checked(unsafe { tp_check(Some(take), (&raw mut found).cast()) }).unwrap();
    assert_eq!(failures as usize, found.iter().filter(|f| f.severity == TP_SEVERITY_FAILURE).count());
    found
}

/// The warnings and failures among findings.
pub fn troubles(found: &[Found]) -> Vec<&Found> {
    found.iter().filter(|finding| finding.severity >= TP_SEVERITY_WARNING).collect()
}

/// Runs the command that a finding prints, after which `tp_check` must not report the finding any more.
pub fn fix_finding(net: &Net, id: &str, severity: u32) {
    let found = net.run(check);
    let one = found.iter().find(|finding| finding.id == id && finding.severity == severity);
    let one = one.unwrap_or_else(|| panic!("{id} not found among {found:#?}"));
    net.sh(&one.fix);
    // A process that is killed does not end at once.
    eventually(&format!("{id} is fixed"), || {
        !net.run(check).iter().any(|finding| finding.id == id && finding.severity != TP_SEVERITY_OK)
    });
}

/// The name of before.
pub use fix_finding as cured;
