//! What this process may do, and the kernel that it runs on.

use super::{Errno, Result};

/// Returns the soft and the hard descriptor limit of this process (`u64::MAX`: unlimited).
pub(crate) fn descriptor_limits() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid for writes of a limit.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    #[allow(clippy::useless_conversion, reason = "its width is the platform's")]
    (rc == 0).then_some((limit.rlim_cur.into(), limit.rlim_max.into()))
}

/// Returns the effective capabilities of this thread as a bit set, by capget(2), which does not need /proc.
pub(crate) fn effective_capabilities() -> Result<u64> {
    /// _LINUX_CAPABILITY_VERSION_3, `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct`.
    const VERSION: u32 = 0x2008_0522;
    let mut header = [VERSION, 0];
    let mut sets = [0u32; 6];
    // SAFETY: the header has 8 bytes, and the buffer holds the two parts of the three sets.
    let rc = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    let [low, _, _, high, _, _] = sets;
    if rc == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Errno::last()) }
}

/// Returns the effective user and group IDs.
pub(crate) fn effective_ids() -> (u32, u32) {
    // SAFETY: plain system calls, which do not fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Whether a capability is in the bounding set, so that executed programs can have it; `None`: unknown.
pub(crate) fn is_in_bounding_set(capability: u32) -> Option<bool> {
    let nothing: libc::c_ulong = 0;
    // SAFETY: a plain system call.
    match unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), nothing, nothing, nothing) } {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Returns the kernel release of uname(2).
pub(crate) fn kernel_release() -> String {
    // SAFETY: a struct of bytes, for which all zero is valid; valid for writes.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    let bytes: Vec<u8> = name.release.iter().map(|letter| *letter as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
