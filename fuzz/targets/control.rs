//! Hostile control data: whatever bytes a message has, finding its original
//! destination reads no others, and gives the same as parsing them.
//!
//! The first two bytes choose what the sender's address looks like; the rest
//! are the control data. They lie in memory of just their length, so that
//! AddressSanitizer sees every step beyond it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tproxy::ffi::tp_msg_orig_dst;
use tproxy::udp::Control;

fuzz_target!(|data: &[u8]| {
    let Some(([family, name_len], control)) = data.split_first_chunk() else { return };
    let mut control = control.to_vec().into_boxed_slice();
    let parsed = Control::parse(&control);
    let mut name = vec![0u8; usize::from(name_len % 40)].into_boxed_slice();
    if let Some(first) = name.first_mut() {
        *first = *family;
    }
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_name, message.msg_namelen) = (name.as_mut_ptr().cast(), name.len() as libc::socklen_t);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), control.len());
    // SAFETY: all zero is a valid sockaddr_in6.
    let mut found: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&found) as libc::socklen_t;
    // SAFETY: the message is as long as it says, and there is room for an address.
    let rc = unsafe { tp_msg_orig_dst(&raw const message, (&raw mut found).cast(), &raw mut len) };
    assert_eq!(rc == 0, parsed.orig_dst.is_some());
    if let Some(to) = parsed.orig_dst {
        assert_eq!(u16::from_be(found.sin6_port), to.port());
    }
});
