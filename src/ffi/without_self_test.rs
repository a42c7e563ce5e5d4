//! Stands in for `self_test` in a build without feature `self-test`.

use std::ffi::{c_int, c_void};

use super::check::tp_finding_fn;
use super::config::tp_rules_config;
use crate::error::{Error, Result};

/// The body of [`tp_self_test`](super::tp_self_test).
pub(super) unsafe fn run(_: *const tp_rules_config, _: usize, _: tp_finding_fn, _: *mut c_void) -> Result<c_int> {
    Err(Error::lacks("self-test"))
}
