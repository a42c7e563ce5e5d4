//! Stands in for `report` in a build without feature `check`.

use std::ffi::{c_int, c_void};

use super::check::tp_finding_fn;
use crate::error::{Error, Result};

/// The body of [`tp_check`](super::tp_check).
pub(super) unsafe fn check(_: tp_finding_fn, _: *mut c_void) -> Result<c_int> {
    Err(Error::lacks("check"))
}
