//! The layout of netlink: headers, alignment, attributes, nesting. No other
//! file knows these (`netlink(7)`, `linux/netlink.h`).
//!
//! Messages are native-endian. Attribute values are bytes here; which order
//! they are in is the business of whoever puts them.

use super::uapi::{NLA_F_NESTED, NLA_TYPE_MASK};
use crate::name::Name;
use crate::sys;

/// A kernel header is aligned to this many bytes, and so is every attribute.
const ALIGN: usize = 4;
/// `struct nlmsghdr`: length, type, flags, sequence, port.
const MESSAGE_HEADER: usize = 16;
/// `struct nlattr`: length, type.
const ATTRIBUTE_HEADER: usize = 4;

fn align(len: usize) -> usize {
    len.next_multiple_of(ALIGN)
}

/// Messages one behind the other, as one `sendto` takes them.
#[derive(Default)]
pub(crate) struct Buffer {
    /// What is written, and behind it zeros, with which padding is there already. Its length is a multiple of ALIGN.
    room: Vec<u8>,
    /// How much is written.
    len: usize,
    overflow: bool,
    /// There was no memory for what was appended last.
    out_of_memory: bool,
}

impl Buffer {
    /// The first room, and the most that is added at once: what is not written costs memory too.
    const FIRST_ROOM: usize = 1 << 8;
    const MOST_ROOM: usize = 64 << 10;

    /// With room for so many bytes, and then for more.
    pub fn with_room(len: usize) -> Buffer {
        let mut buffer = Buffer::default();
        buffer.resize(align(len));
        buffer
    }

    /// Appends a message: its family's own header, then its attributes.
    #[inline(always)]
    pub fn message(&mut self, kind: u16, flags: u16, seq: u32, header: &[u8], attrs: impl FnOnce(&mut Attrs<'_>)) {
        let start = self.begin(kind, flags, seq, header);
        attrs(&mut Attrs { buffer: self });
        self.end(start);
    }

    fn begin(&mut self, kind: u16, flags: u16, seq: u32, header: &[u8]) -> usize {
        let start = self.len;
        let ([k0, k1], [f0, f1], [s0, s1, s2, s3]) = (kind.to_ne_bytes(), flags.to_ne_bytes(), seq.to_ne_bytes());
        self.append([0, 0, 0, 0, k0, k1, f0, f1, s0, s1, s2, s3, 0, 0, 0, 0]);
        self.append_slice(header);
        self.pad();
        start
    }

    fn end(&mut self, start: usize) {
        match u32::try_from(self.len - start) {
            Ok(len) => self.write_at(start, len.to_ne_bytes()),
            Err(_) => self.overflow = true,
        }
    }

    /// The bytes to send. EMSGSIZE: an attribute was longer than its 16-bit length can say.
    pub fn bytes(&self) -> sys::Result<&[u8]> {
        match self.room.get(..self.len) {
            Some(bytes) if !self.overflow && !self.out_of_memory => Ok(bytes),
            _ if self.out_of_memory => Err(sys::Errno(libc::ENOMEM)),
            _ => Err(sys::Errno(libc::EMSGSIZE)),
        }
    }

    /// The message that was appended at this place.
    pub fn message_at(&self, start: usize) -> Option<&[u8]> {
        let rest = self.room.get(start..self.len)?;
        rest.get(..u32_at(rest, 0)? as usize)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn write_at<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        if let Some(place) = self.room.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *place = value;
        }
    }

    /// A length that the compiler knows is a move or two.
    #[inline(always)]
    fn append<const N: usize>(&mut self, value: [u8; N]) {
        self.make_room(N);
        self.write_at(self.len, value);
        self.len += N;
    }

    fn append_slice(&mut self, value: &[u8]) {
        self.make_room(value.len());
        let end = self.len + value.len();
        if let Some(place) = self.room.get_mut(self.len..end) {
            place.copy_from_slice(value);
        }
        self.len = end;
    }

    #[inline(always)]
    fn pad(&mut self) {
        self.len = align(self.len);
    }

    #[inline(always)]
    fn make_room(&mut self, more: usize) {
        if self.room.len().saturating_sub(self.len) < more {
            self.grow(more);
        }
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self, more: usize) {
        let room = align(self.len + more) + self.room.len().clamp(Self::FIRST_ROOM, Self::MOST_ROOM);
        self.resize(room);
    }

    /// Makes it so long, with zeros. Without memory it stays as it is, and what is written beyond is lost.
    fn resize(&mut self, len: usize) {
        match self.room.try_reserve(len.saturating_sub(self.room.len())) {
            Ok(()) => self.room.resize(len, 0),
            Err(_) => self.out_of_memory = true,
        }
    }
}

/// The attributes of a message, or of a nested attribute, being written.
pub(crate) struct Attrs<'a> {
    buffer: &'a mut Buffer,
}

impl Attrs<'_> {
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.pieces(kind, [value]);
    }

    /// A string with its terminating NUL.
    pub fn string(&mut self, kind: u16, value: &str) {
        self.header(kind, value.len() + 1);
        self.buffer.append_slice(value.as_bytes());
        self.buffer.append([0]);
        self.buffer.pad();
    }

    /// A name with its terminating NUL.
    pub fn name(&mut self, kind: u16, name: &Name) {
        self.pieces(kind, [name.as_bytes(), &[0]]);
    }

    /// Bytes, one piece behind the other.
    #[inline(always)]
    pub fn pieces<const N: usize>(&mut self, kind: u16, pieces: [&[u8]; N]) {
        self.header(kind, pieces.iter().map(|piece| piece.len()).sum());
        pieces.into_iter().for_each(|piece| self.buffer.append_slice(piece));
        self.buffer.pad();
    }

    pub fn u8(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    /// Native-endian, as rtnetlink has it.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.four(kind, value.to_ne_bytes());
    }

    /// Big-endian, as nf_tables has it.
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.four(kind, value.to_be_bytes());
    }

    /// Most attributes are of four bytes: they are written in one go.
    fn four(&mut self, kind: u16, [v0, v1, v2, v3]: [u8; 4]) {
        const LEN: [u8; 2] = (ATTRIBUTE_HEADER as u16 + 4).to_ne_bytes();
        let [k0, k1] = kind.to_ne_bytes();
        self.buffer.append([LEN[0], LEN[1], k0, k1, v0, v1, v2, v3]);
    }

    #[inline(always)]
    pub fn nest(&mut self, kind: u16, attrs: impl FnOnce(&mut Attrs<'_>)) {
        let start = self.buffer.len;
        self.header(kind | NLA_F_NESTED, 0);
        attrs(&mut Attrs { buffer: self.buffer });
        self.end(start);
    }

    fn header(&mut self, kind: u16, len: usize) {
        let len = u16::try_from(ATTRIBUTE_HEADER + len).unwrap_or_else(|_| {
            self.buffer.overflow = true;
            0
        });
        let ([l0, l1], [k0, k1]) = (len.to_ne_bytes(), kind.to_ne_bytes());
        self.buffer.append([l0, l1, k0, k1]);
    }

    /// All that is in a nested attribute is padded.
    fn end(&mut self, start: usize) {
        match u16::try_from(self.buffer.len - start) {
            Ok(len) => self.buffer.write_at(start, len.to_ne_bytes()),
            Err(_) => self.buffer.overflow = true,
        }
    }
}

/// A message that was received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub seq: u32,
    pub payload: &'a [u8],
}

/// The messages in what one `recv` returned; ends at the first that makes no sense.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let payload = bytes.get(MESSAGE_HEADER..len)?;
        let message = Message { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, seq: u32_at(bytes, 8)?, payload };
        bytes = bytes.get(align(len)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in a payload behind its family's header; ends at the first that makes no sense.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    attributes_at(bytes).map(|(_, kind, value)| (kind, value))
}

/// As [`attributes`], each with the offset of its header.
fn attributes_at(bytes: &[u8]) -> impl Iterator<Item = (usize, u16, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (kind, value) = attribute_at(bytes, at)?;
        let found = (at, kind, value);
        at += align(ATTRIBUTE_HEADER + value.len());
        Some(found)
    })
}

#[inline(never)]
fn attribute_at(bytes: &[u8], at: usize) -> Option<(u16, &[u8])> {
    let rest = bytes.get(at..)?;
    // Taken apart at once: a check of a host reads tens of thousands of them.
    let [len, more_len, kind, more_kind] = *rest.first_chunk::<ATTRIBUTE_HEADER>()?;
    let value = rest.get(ATTRIBUTE_HEADER..u16::from_ne_bytes([len, more_len]) as usize)?;
    Some((u16::from_ne_bytes([kind, more_kind]) & NLA_TYPE_MASK, value))
}

/// The value of the first attribute of a kind.
#[inline(never)]
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The first of a kind as a byte.
#[inline(never)]
pub(crate) fn u8_of(bytes: &[u8], kind: u16) -> Option<u8> {
    attribute(bytes, kind)?.first().copied()
}

/// The first of a kind as a number, native-endian.
#[inline(never)]
pub(crate) fn u32_of(bytes: &[u8], kind: u16) -> Option<u32> {
    u32_at(attribute(bytes, kind)?, 0)
}

/// The first of a kind as a number, big-endian.
#[inline(never)]
pub(crate) fn be32_of(bytes: &[u8], kind: u16) -> Option<u32> {
    be32(attribute(bytes, kind)?)
}

/// The first of a kind as a string.
#[inline(never)]
pub(crate) fn string_of(bytes: &[u8], kind: u16) -> Option<&str> {
    string(attribute(bytes, kind)?)
}

/// The first of a kind as a name that another program gave.
#[inline(never)]
pub(crate) fn name_of(bytes: &[u8], kind: u16) -> Option<Name> {
    attribute(bytes, kind).map(Name::new)
}

/// The attributes of a whole message whose family's own header has this length.
pub(crate) fn body(message: &[u8], header: usize) -> &[u8] {
    message.get(MESSAGE_HEADER + align(header)..).unwrap_or_default()
}

/// The way down to the attribute at `offset` of a message: the position among its siblings and the kind, outermost first.
///
/// `header` is the length of the family's own header. Empty if the offset is in no attribute.
pub(crate) fn path_to(message: &[u8], header: usize, offset: usize) -> Vec<(usize, u16)> {
    let mut path = Vec::new();
    let mut start = MESSAGE_HEADER + align(header);
    let mut bytes = body(message, header);
    while let Some((index, (at, kind, value))) = attributes_at(bytes)
        .enumerate()
        .find(|(_, (at, _, value))| (start + at..start + at + ATTRIBUTE_HEADER + value.len()).contains(&offset))
    {
        path.push((index, kind));
        if offset == start + at {
            break;
        }
        start += at + ATTRIBUTE_HEADER;
        bytes = value;
    }
    path
}

/// A string attribute, without its NUL.
pub(crate) fn string(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(until_nul(value)).ok()
}

/// The bytes of a string attribute, without its NUL.
pub(crate) fn until_nul(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == 0).next().unwrap_or_default()
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}

pub(crate) fn be64(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*value.first_chunk()?))
}

/// For the properties of everything that reads answers.
#[cfg(test)]
pub(crate) mod odd {
    use proptest::prelude::*;

    /// An answer that is well formed as far as its attributes go, which are of any kind, length and depth, and some cut
    /// off: bytes alone would mostly end at the first.
    pub(crate) fn answer(header: usize) -> impl Strategy<Value = Vec<u8>> {
        let value = proptest::collection::vec(prop_oneof![0..4u8, any::<u8>()], 0..20);
        let value = prop_oneof![value, Just(b"lo\0".to_vec()), Just(b"c\0".to_vec())];
        let attributes = value.prop_recursive(4, 60, 8, |inner| {
            proptest::collection::vec((prop_oneof![0..8u16, 0..40u16], inner), 0..8).prop_map(|attributes| {
                let mut bytes = Vec::new();
                for (kind, value) in attributes {
                    bytes.extend((value.len() as u16 + 4).to_ne_bytes());
                    bytes.extend(kind.to_ne_bytes());
                    bytes.extend(value);
                    bytes.resize(bytes.len().next_multiple_of(4), 0);
                }
                bytes
            })
        });
        let header = proptest::collection::vec(prop_oneof![Just(2u8), Just(10), 0..4u8, any::<u8>()], header);
        (header, attributes, prop_oneof![Just(0usize), 0..200usize]).prop_map(|(mut bytes, attributes, cut)| {
            bytes.extend(attributes);
            bytes.truncate(bytes.len().saturating_sub(cut));
            bytes
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Buffer {
        let mut buffer = Buffer::default();
        buffer.message(0x0a03, 0x0401, 7, &[1, 0, 0, 0], |a| {
            a.string(1, "t");
            a.nest(4, |a| {
                a.be32(1, 3);
                a.u8(2, 9);
            });
        });
        buffer
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn message_layout_equals_kernel() {
        #[rustfmt::skip]
        let expected: &[u8] = &[
            48, 0, 0, 0,  0x03, 0x0a, 0x01, 0x04,  7, 0, 0, 0,  0, 0, 0, 0,
            1, 0, 0, 0,
            6, 0, 1, 0,  b't', 0, 0, 0,
            20, 0, 4, 0x80,
                8, 0, 1, 0,  0, 0, 0, 3,
                5, 0, 2, 0,  9, 0, 0, 0,
        ];
        assert_eq!(sample().bytes().unwrap(), expected);
    }

    #[test]
    fn message_written_is_read_back() {
        let buffer = sample();
        let mut found = messages(buffer.bytes().unwrap());
        let message = found.next().unwrap();
        assert_eq!((message.kind, message.flags, message.seq), (0x0a03, 0x0401, 7));
        let attrs = &message.payload[4..];
        assert_eq!(attribute(attrs, 1).and_then(string), Some("t"));
        assert_eq!(attribute(attribute(attrs, 4).unwrap(), 1).and_then(be32), Some(3));
        assert_eq!(found.next(), None);
    }

    #[test]
    fn attribute_at_offset_is_found() {
        let buffer = sample();
        let bytes = buffer.bytes().unwrap();
        assert_eq!(path_to(bytes, 4, 20), [(0, 1)]);
        assert_eq!(path_to(bytes, 4, 28), [(1, 4)]);
        assert_eq!(path_to(bytes, 4, 40), [(1, 4), (1, 2)]);
        assert_eq!(path_to(bytes, 4, 4), []);
        assert_eq!(path_to(bytes, 4, 4000), []);
    }

    #[test]
    fn attribute_too_long_is_not_truncated() {
        let mut buffer = Buffer::default();
        buffer.message(1, 0, 0, &[], |a| a.bytes(1, &[0; 70_000]));
        assert_eq!(buffer.bytes(), Err(sys::Errno(libc::EMSGSIZE)));
    }

    proptest! {
        #[test]
        fn message_of_any_bytes_does_not_panic_or_loop(bytes in proptest::collection::vec(any::<u8>(), 0..300), offset in 0..400usize) {
            for message in messages(&bytes) {
                for (_, value) in attributes(message.payload) {
                    attributes(value).for_each(drop);
                }
            }
            path_to(&bytes, 4, offset);
        }

        #[test]
        fn attributes_written_are_read_back(values in proptest::collection::vec((0..100u16, proptest::collection::vec(any::<u8>(), 0..40)), 0..20)) {
            let mut buffer = Buffer::default();
            buffer.message(1, 2, 3, &[], |a| values.iter().for_each(|(kind, value)| a.bytes(*kind, value)));
            let bytes = buffer.bytes().unwrap();
            let message = messages(bytes).next().unwrap();
            let found: Vec<(u16, Vec<u8>)> = attributes(message.payload).map(|(k, v)| (k, v.to_vec())).collect();
            prop_assert_eq!(found, values);
        }
    }
}
