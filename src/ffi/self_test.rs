//! The self-test, for C.

use std::ffi::{c_int, c_void};

use super::arg;
use super::check::tp_finding_fn;
use super::config::*;
use super::report::report_all;
use crate::error::Result;

/// The body of [`tp_self_test`](super::tp_self_test).
///
/// # Safety
/// `config` is valid for reads of `size` bytes, with all that it points to; `report` may be called with a finding and
/// this context.
pub(super) unsafe fn run(
    config: *const tp_rules_config,
    size: usize,
    report: tp_finding_fn,
    context: *mut c_void,
) -> Result<c_int> {
    // SAFETY: by the caller's word; the struct is integers and pointers.
    let config = unsafe { arg::sized("config", config, size, FIRST_VERSION) }?;
    let report = report.ok_or_else(|| arg::null("report"))?;
    // SAFETY: by the caller's word.
    let findings = crate::self_test(&unsafe { decode(&config) }?)?;
    // SAFETY: by the caller's word.
    Ok(unsafe { report_all(report, context, &findings) })
}
