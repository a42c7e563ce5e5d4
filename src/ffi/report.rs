//! Findings, handed to C one by one.

use std::ffi::{CString, c_int, c_void};
use std::fmt::Write;

use super::arg;
use super::check::*;
use crate::check::{self, Finding, Severity};
use crate::error::Result;
use crate::name::Escaping;

/// The body of [`tp_check`].
///
/// # Safety
/// `report` may be called with a finding and this context.
pub(super) unsafe fn check(report: tp_finding_fn, context: *mut c_void) -> Result<c_int> {
    let report = report.ok_or_else(|| arg::null("report"))?;
    // SAFETY: by the caller's word.
    Ok(unsafe { report_all(report, context, &check::check()) })
}

/// Hands findings to C, and counts the failures.
///
/// # Safety
/// As for [`invoke_callback`].
pub(super) unsafe fn report_all(
    report: unsafe extern "C" fn(*const tp_finding, *mut c_void),
    context: *mut c_void,
    findings: &[Finding],
) -> c_int {
    // SAFETY: by the caller's word.
    findings.iter().for_each(|finding| unsafe { invoke_callback(report, context, finding) });
    findings.iter().filter(|finding| finding.severity == Severity::Failure).count() as c_int
}

/// Hands a finding to C.
///
/// # Safety
/// `report` may be called with a finding and this context.
unsafe fn invoke_callback(
    report: unsafe extern "C" fn(*const tp_finding, *mut c_void),
    context: *mut c_void,
    finding: &Finding,
) {
    // Names that other programs gave may have anything in them, for a terminal too.
    let text = |text: &str| {
        let mut escaped = String::new();
        // Writing to a String does not fail; no NUL is left.
        let _ = Escaping(&mut escaped).write_str(text);
        CString::new(escaped).unwrap_or_default()
    };
    let [id, message, impact, fix] = [finding.kind.id, &finding.message, finding.kind.impact, &finding.fix].map(text);
    let finding = tp_finding {
        severity: match finding.severity {
            Severity::Ok => TP_SEVERITY_OK,
            Severity::Note => TP_SEVERITY_NOTE,
            Severity::Warning => TP_SEVERITY_WARNING,
            Severity::Failure => TP_SEVERITY_FAILURE,
        },
        id: id.as_ptr(),
        message: message.as_ptr(),
        impact: impact.as_ptr(),
        fix: fix.as_ptr(),
    };
    // SAFETY: by the caller's word; the texts live until it returns.
    unsafe { report(&raw const finding, context) };
}
