//! What is wrong, and what cures it.

use std::ffi::{c_char, c_int, c_void};

use super::config::*;
use super::guard::guard;
use super::{report, self_test};

/// The check passed.
pub const TP_SEVERITY_OK: u32 = 0;
/// Information that needs no action.
pub const TP_SEVERITY_NOTE: u32 = 1;
/// Some traffic may be lost, or may bypass the proxy.
pub const TP_SEVERITY_WARNING: u32 = 2;
/// Interception cannot work.
pub const TP_SEVERITY_FAILURE: u32 = 3;

/// Result of one check.
///
/// It is valid only during the call of the tp_finding_fn. No pointer is NULL. Texts are UTF-8.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tp_finding {
    /// TP_SEVERITY_OK, TP_SEVERITY_NOTE, TP_SEVERITY_WARNING or TP_SEVERITY_FAILURE.
    pub severity: u32,
    /// Identifier for programs, such as "sysctl.src_valid_mark". It does not change in later versions.
    /// docs/troubleshooting.md lists all identifiers.
    pub id: *const c_char,
    /// What was found, as human-readable text.
    pub message: *const c_char,
    /// Its effect on traffic, as human-readable text.
    pub impact: *const c_char,
    /// Command for sh(1) that fixes it; empty if there is nothing to fix or no command fixes it. Names that
    /// other programs chose are quoted in it. Read the command before you run it: some fixes end the process
    /// that owns the rules, or delete a rule that another program made.
    pub fix: *const c_char,
}

/// Callback for findings of tp_check() and tp_self_test().
///
/// Called once per finding, in the thread that called tp_check() or tp_self_test(), with the context given
/// there. It must return (no longjmp, no C++ exception). It may call this library.
#[allow(non_camel_case_types)]
pub type tp_finding_fn = Option<unsafe extern "C" fn(finding: *const tp_finding, context: *mut c_void)>;

/// Diagnoses this host: reports what breaks or weakens transparent proxying, whoever configured it, with
/// the command that fixes it.
///
/// Queries the kernel about this process, its network namespace, and all rules, routes, sysctls and
/// listeners there: capabilities; IP_TRANSPARENT, by setting it on a socket; the features of nf_tables, by a
/// transaction that is never committed; rules of this library without a listener or an owner; and the
/// effect of other programs' rules on intercepted packets.
///
/// @param report   called once per finding, including passed checks.
/// @param context  passed to report.
/// @return number of failures (findings of TP_SEVERITY_FAILURE), or -1 with errno:
///   EFAULT  report is NULL
///   EOPNOTSUPP
///           the library was built without feature `check`
///
/// Changes nothing, except that the kernel may load a module that it is queried about. Runs no program.
/// Needs no privilege; what cannot be read without privilege is reported as the note "check.unseen".
/// Usually takes milliseconds, longer with thousands of rules.
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_check(report: tp_finding_fn, context: *mut c_void) -> c_int {
    // SAFETY: the caller's function, and its context.
    guard(|| unsafe { report::check(report, context) })
}

/// Tests the configuration on this kernel: in a temporary network namespace, sends one TCP connection and
/// one UDP datagram per selected family through the rules and reports the result.
///
/// For a lost probe, reports the last netfilter hook that saw it. The rules are installed in the temporary
/// network namespace, with listeners created there as config describes them; descriptors in config are
/// inspected but not used. The call therefore tests config and the kernel. For the effect of other
/// programs' rules on this host use tp_check(). The host's configuration is not changed.
///
/// @param config   configuration, as for tp_install_rules().
/// @param size     sizeof(struct tp_rules_config).
/// @param report   called once per finding, including passed checks.
/// @param context  passed to report.
/// @return number of failures (findings of TP_SEVERITY_FAILURE), or -1 with errno:
///   EFAULT  config or report is NULL
///   EPERM   CAP_SYS_ADMIN is missing, which is needed to create a network namespace (an unprivileged user
///           has it in `unshare -r`)
///   ETIMEDOUT
///           the veth pair of the test carried no packet within 10 seconds
///   EOPNOTSUPP
///           the library was built without feature `self-test`
///   EINVAL, E2BIG, EOPNOTSUPP
///           as for tp_install_rules(); its other errors are possible too
///
/// Usually takes milliseconds, up to six seconds if a probe is lost. Starts a thread, because a network
/// namespace belongs to a thread. The thread receives no signals and has ended when the call returns.
///
/// Thread-safe.
///
/// @since 0.1.0
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tp_self_test(
    config: *const tp_rules_config,
    size: usize,
    report: tp_finding_fn,
    context: *mut c_void,
) -> c_int {
    // SAFETY: by the caller's word.
    guard(|| unsafe { self_test::run(config, size, report, context) })
}
