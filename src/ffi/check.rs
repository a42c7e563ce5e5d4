//! What is wrong, and what cures it.

use std::ffi::{CString, c_char, c_int, c_void};

use super::arg;
use super::guard::guard;
use crate::check::{self, Finding, Severity};
use crate::error::Result;

/// As it should be.
pub const TP_OK: u32 = 0;
/// Good to know.
pub const TP_NOTE: u32 = 1;
/// Some traffic may be lost, or pass by the proxy.
pub const TP_WARNING: u32 = 2;
/// Interception cannot work.
pub const TP_FAILURE: u32 = 3;

/// Something that was found. All of it is valid during the call of a
/// tp_finding_fn alone; no pointer is NULL; texts are UTF-8.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_finding {
    /// TP_OK, TP_NOTE, TP_WARNING or TP_FAILURE.
    pub severity: u32,
    /// What kind of finding it is, for programs: "sysctl.src_valid_mark". It
    /// stays the same in later versions. docs/troubleshooting.md has them all.
    pub id: *const c_char,
    /// What was found, for people.
    pub found: *const c_char,
    /// What it does to traffic, for people.
    pub effect: *const c_char,
    /// The command that cures it, for sh(1). Empty: nothing is to be cured, or
    /// no command does. Read it before you run it: some cures end the process
    /// that the rules belong to, or delete a rule that somebody else made.
    pub cure: *const c_char,
}

/// Is told what was found: one call for each finding, from the thread that
/// called tp_check or tp_self_test, with the context that was given to it. It
/// must return (no longjmp, no C++ exception), and may call this library.
#[allow(non_camel_case_types)]
pub type tp_finding_fn = Option<unsafe extern "C" fn(finding: *const tp_finding, context: *mut c_void)>;

/// Says what on this host breaks, or weakens, transparent proxying, and the
/// command that cures it.
///
/// It asks the kernel, about this process, its network namespace, and whatever
/// rules, routes, sysctls and listeners are there, by whomever: capabilities;
/// IP_TRANSPARENT, by setting it; what nf_tables can do, by a transaction
/// that is never committed; rules of this library without a listener or an
/// owner; and what other programs' rules do to packets that are intercepted.
/// It changes nothing (but the kernel may load a module that it is asked
/// about), runs no program, and needs no privilege; what it cannot see
/// without one it says as a note, "check.unseen".
///
/// report: is told each finding, good ones too. context: is handed on to it.
///
/// Returns the number of failures (findings of TP_FAILURE), 0 if there are
/// none, or -1 with errno: EFAULT: report is NULL.
///
/// Takes some milliseconds, more with thousands of rules. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_check(report: tp_finding_fn, context: *mut c_void) -> c_int {
    guard(|| {
        let report = report.ok_or_else(|| arg::null("report"))?;
        let findings = check::check();
        findings.iter().try_for_each(|finding| {
            // SAFETY: the caller's function, and its context.
            unsafe { tell(report, context, finding) }
        })?;
        Ok(findings.iter().filter(|finding| finding.severity == Severity::Failure).count() as c_int)
    })
}

/// Hands a finding to C.
///
/// # Safety
/// `report` may be called with a finding and this context.
unsafe fn tell(
    report: unsafe extern "C" fn(*const tp_finding, *mut c_void),
    context: *mut c_void,
    finding: &Finding,
) -> Result<()> {
    // Names that other programs gave may have anything in them, but no NUL.
    let text = |text: &str| CString::new(text.replace('\0', "?")).unwrap_or_default();
    let [id, found, effect, cure] = [finding.kind.id, &finding.found, finding.kind.effect, &finding.cure].map(text);
    let finding = tp_finding {
        severity: match finding.severity {
            Severity::Ok => TP_OK,
            Severity::Note => TP_NOTE,
            Severity::Warning => TP_WARNING,
            Severity::Failure => TP_FAILURE,
        },
        id: id.as_ptr(),
        found: found.as_ptr(),
        effect: effect.as_ptr(),
        cure: cure.as_ptr(),
    };
    // SAFETY: by the caller's word; the texts live until it returns.
    unsafe { report(&raw const finding, context) };
    Ok(())
}
