//! `tp_check`, with Rust's types.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use tproxy::ffi::*;

use super::{Net, PATIENCE, checked};

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub severity: u32,
    pub id: String,
    pub found: String,
    pub effect: String,
    pub cure: String,
}

/// Takes findings into a `Vec<Found>`, the context.
pub unsafe extern "C" fn take(finding: *const tp_finding, context: *mut std::ffi::c_void) {
    // SAFETY: a finding whose texts are valid during the call, and the context that the caller gave.
    unsafe {
        let text = |text| CStr::from_ptr(text).to_str().unwrap().to_owned();
        let tp_finding { severity, id, found, effect, cure } = *finding;
        let found = Found { severity, id: text(id), found: text(found), effect: text(effect), cure: text(cure) };
        (*context.cast::<Vec<Found>>()).push(found);
    }
}

/// `tp_check`, in this thread's namespace.
pub fn check() -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    // SAFETY: the function that takes such a context.
    let failures = checked(unsafe { tp_check(Some(take), (&raw mut found).cast()) }).unwrap();
    assert_eq!(failures as usize, found.iter().filter(|f| f.severity == TP_FAILURE).count());
    found
}

/// The warnings and failures among findings.
pub fn troubles(found: &[Found]) -> Vec<&Found> {
    found.iter().filter(|finding| finding.severity >= TP_WARNING).collect()
}

/// Finds it, runs its cure, and finds it no more.
pub fn cured(net: &Net, id: &str, severity: u32) {
    let found = net.run(check);
    let one = found.iter().find(|finding| finding.id == id && finding.severity == severity);
    let one = one.unwrap_or_else(|| panic!("{id} not found among {found:#?}"));
    net.sh(&one.cure);
    // A process that was told to end needs a moment.
    let deadline = Instant::now() + PATIENCE;
    let left = || net.run(check).into_iter().find(|finding| finding.id == id && finding.severity != TP_OK);
    while let Some(finding) = left() {
        assert!(Instant::now() < deadline, "{finding:#?} is found still");
        std::thread::sleep(Duration::from_millis(10));
    }
}
