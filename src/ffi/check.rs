//! What is wrong, and what cures it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt::Write;

use super::arg;
use super::config::*;
use super::guard::guard;
use crate::check::{self, Finding, Severity};
use crate::name::Escaping;
use crate::self_test;

/// As it should be.
pub const TP_SEVERITY_OK: u32 = 0;
/// Good to know.
pub const TP_SEVERITY_NOTE: u32 = 1;
/// Some traffic may be lost, or pass by the proxy.
pub const TP_SEVERITY_WARNING: u32 = 2;
/// Interception cannot work.
pub const TP_SEVERITY_FAILURE: u32 = 3;

/// Something that was found. All of it is valid during the call of a
/// tp_finding_fn alone; no pointer is NULL. Texts are UTF-8 without control
/// characters and others that mislead; names that other programs gave are
/// shown with escapes in place of these, as is what is no UTF-8 in them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_finding {
    /// TP_SEVERITY_OK, TP_SEVERITY_NOTE, TP_SEVERITY_WARNING or TP_SEVERITY_FAILURE.
    pub severity: u32,
    /// What kind of finding it is, for programs: "sysctl.src_valid_mark". It
    /// stays the same in later versions. docs/troubleshooting.md has them all.
    pub id: *const c_char,
    /// What was found, for people.
    pub message: *const c_char,
    /// What it does to traffic, for people.
    pub impact: *const c_char,
    /// The command that fixes it, for root's sh(1) in this process's network
    /// and PID namespace. Empty: nothing is to be fixed, or no command does so
    /// without doing harm. Names that others gave are quoted in it, whatever is
    /// in them; a word in capitals is for you to fill in. Read it before you run
    /// it: some fixes end the process that the rules belong to (it was seen to
    /// have them), or delete a rule that somebody else made.
    pub fix: *const c_char,
}

/// Is told what was found: one call for each finding, from the thread that
/// called tp_check or tp_self_test, with the context that was given to it. It
/// must return (no longjmp, no C++ exception), and may call this library.
#[allow(non_camel_case_types)]
pub type tp_finding_fn = Option<unsafe extern "C" fn(finding: *const tp_finding, context: *mut c_void)>;

/// Says what on this host breaks, or weakens, transparent proxying, and the
/// command that fixes it.
///
/// It asks the kernel, about this process, its network namespace, and whatever
/// rules, routes, sysctls and listeners are there, by whomever: capabilities;
/// IP_TRANSPARENT, by setting it; what nf_tables can do, by a transaction
/// that is never committed; rules of this library without a listener or an
/// owner; and what other programs' rules do to packets that are intercepted.
/// It changes nothing (but the kernel may load a module that it is asked
/// about), runs no program, and needs no privilege and no /proc. What it
/// cannot see is not reported as missing; it says so by a note, "check.unseen".
///
/// Other programs may have any number of rules, routes and sockets. Each list is
/// read up to a bound (some ten thousand rules, a thousand routes of a table),
/// and no more than 100 findings of a kind are told; there is such a note for
/// each bound that was reached.
///
/// report: is told each finding, good ones too. context: is handed on to it.
///
/// Returns the number of failures (findings of TP_SEVERITY_FAILURE), 0 if there are
/// none, or -1 with errno: EFAULT: report is NULL.
///
/// Takes some milliseconds, with thousands of rules a tenth of a second.
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_check(report: tp_finding_fn, context: *mut c_void) -> c_int {
    guard(|| {
        let report = report.ok_or_else(|| arg::null("report"))?;
        // SAFETY: the caller's function, and its context.
        Ok(unsafe { report_all(report, context, &check::check()) })
    })
}

/// Tries whether rules work on this kernel: sends a connection and a datagram
/// of each family through them, as far as config asks for these, in a network
/// that exists only during the call, and says what became of each; of one that
/// was lost, at which hook it was last seen.
///
/// The rules are installed in that network, not in the caller's, with
/// listeners made there as config describes them (the descriptors in it are
/// looked at, and not used). So it tests config and the kernel; what other
/// programs' rules do on this host is tp_check's. Nothing of the host is changed.
///
/// config, size: as tp_install_rules. report, context: as tp_check.
///
/// Returns the number of failures, or -1 with errno: as tp_install_rules, and
/// EPERM also without CAP_SYS_ADMIN, which it takes to make a network
/// (`unshare -r` gives it to anybody). EFAULT: config or report is NULL.
///
/// Takes less than three seconds, mostly some milliseconds: longer if a probe is
/// lost. It starts a thread, because a network belongs to one; the thread
/// gets no signals, and has ended when the call returns. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_self_test(
    config: *const tp_rules_config,
    size: usize,
    report: tp_finding_fn,
    context: *mut c_void,
) -> c_int {
    guard(|| {
        // SAFETY: by the caller's word; the struct is integers and pointers.
        let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
        let report = report.ok_or_else(|| arg::null("report"))?;
        // SAFETY: by the caller's word.
        let findings = self_test(&unsafe { decode(&config) }?)?;
        // SAFETY: the caller's function, and its context.
        Ok(unsafe { report_all(report, context, &findings) })
    })
}

/// Hands findings to C, and counts the failures.
///
/// # Safety
/// As for [`invoke_callback`].
unsafe fn report_all(
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
