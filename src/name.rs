//! Names of chains, tables, sets and interfaces of other programs. The kernel accepts any bytes except NUL.

use std::fmt::{self, Write};

/// A name in the bytes of the kernel. Names are compared by bytes. `Display` escapes and shortens them.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(Box<[u8]>);

/// Maximum number of characters that are displayed. An interface's name has at most 15 bytes, a chain's name in nf_tables 255.
const SHOWN_MAX: usize = 64;

impl Name {
    /// Creates a name from the bytes before the first NUL.
    pub fn new(bytes: &[u8]) -> Name {
        Name(bytes.split(|byte| *byte == 0).next().unwrap_or_default().into())
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the name as text; `None`: it is not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

/// Displays a name of a caller in quotes, and escaped.
pub(crate) fn quoted(name: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| write!(f, "\"{}\"", Name::from(name)))
}

impl From<&str> for Name {
    fn from(text: &str) -> Name {
        Name::new(text.as_bytes())
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        *self == **other
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = 0;
        for chunk in self.0.utf8_chunks() {
            for letter in chunk.valid().chars() {
                shown += 1;
                if shown > SHOWN_MAX {
                    return f.write_str("...");
                }
                match letter {
                    '\\' => f.write_str("\\\\")?,
                    letter if is_plain(letter) => f.write_char(letter)?,
                    letter => write!(f, "{}", letter.escape_unicode())?,
                }
            }
            for byte in chunk.invalid() {
                shown += 1;
                if shown > SHOWN_MAX {
                    return f.write_str("...");
                }
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Whether a character is displayed as itself, whatever its neighbors are: printable ASCII, and letters and digits of scripts that
/// are written from left to right.
fn is_plain(letter: char) -> bool {
    /// Hebrew to Arabic, and the presentation forms and newer scripts that are written from right to left.
    const RIGHT_TO_LEFT: [std::ops::RangeInclusive<char>; 5] = [
        '\u{590}'..='\u{8ff}',
        '\u{fb1d}'..='\u{fdff}',
        '\u{fe70}'..='\u{feff}',
        '\u{10800}'..='\u{10fff}',
        '\u{1e800}'..='\u{1efff}',
    ];
    match letter {
        ' '..='~' => true,
        '\0'..='\u{9f}' => false,
        letter => {
            letter.is_alphanumeric() && !misleads(letter) && !RIGHT_TO_LEFT.iter().any(|range| range.contains(&letter))
        }
    }
}

/// Whether a character is invisible or changes the display of its neighbors: control characters, bidirectional and other format
/// characters, and the Unicode property Default_Ignorable_Code_Point.
fn misleads(letter: char) -> bool {
    match letter {
        ' '..='~' => false,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' => true,
        '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' => true,
        '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}' => true,
        letter => letter.is_control(),
    }
}

/// Writes a message to `out`, and escapes every misleading character. A message may contain text of other programs and of the C
/// library.
pub(crate) struct Escaping<'a, W>(pub &'a mut W);

impl<W: Write> Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, letter)) = rest.char_indices().find(|(_, letter)| misleads(*letter)) {
            let (before, from) = rest.split_at(at);
            self.0.write_str(before)?;
            write!(self.0, "{}", letter.escape_unicode())?;
            rest = from.get(letter.len_utf8()..).unwrap_or_default();
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(bytes: &[u8]) -> String {
        Name::new(bytes).to_string()
    }

    #[test]
    fn name_with_misleading_bytes_is_escaped() {
        assert_eq!(shown(b"PREROUTING"), "PREROUTING");
        assert_eq!(shown("b\u{fc}ro \u{65e5}\u{672c}".as_bytes()), "b\u{fc}ro \u{65e5}\u{672c}");
        assert_eq!(shown("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(shown("a\u{200b}\u{feff}b\u{2066}".as_bytes()), "a\\u{200b}\\u{feff}b\\u{2066}");
        assert_eq!(shown(b"a\x1b[31m\n\x7f"), "a\\u{1b}[31m\\u{a}\\u{7f}");
        assert_eq!(shown("\u{5d0}\u{e0041}\u{3164}\u{301}".as_bytes()), "\\u{5d0}\\u{e0041}\\u{3164}\\u{301}");
        assert_eq!(shown(b"a\xffb\xc3"), "a\\xffb\\xc3");
        assert_eq!(shown(b"\\xff"), "\\\\xff");
        assert_eq!(shown(b"one\0two"), "one");
        assert_eq!(shown(&[b'x'; 255]), format!("{}...", "x".repeat(SHOWN_MAX)));
        assert_eq!(shown(&[0xff; 255]), format!("{}...", "\\xff".repeat(SHOWN_MAX)));
    }

    #[test]
    fn sentence_with_misleading_characters_is_escaped() {
        let mut out = String::new();
        let _ = write!(Escaping(&mut out), "Datei fehlt \u{2013} \u{ab}x\u{bb}\u{202e}\u{7}.");
        assert_eq!(out, "Datei fehlt \u{2013} \u{ab}x\u{bb}\\u{202e}\\u{7}.");
    }

    proptest! {
        #[test]
        fn names_different_are_shown_differently(a: Vec<u8>, b: Vec<u8>) {
            let (a, b) = (Name::new(&a), Name::new(&b));
            let short = a.as_bytes().len() <= SHOWN_MAX && b.as_bytes().len() <= SHOWN_MAX;
            prop_assert!(a == b || !short || a.to_string() != b.to_string());
            prop_assert!(!a.to_string().chars().any(misleads));
        }

        #[test]
        fn sentence_of_any_text_has_no_misleading_character(text: String) {
            let mut out = String::new();
            Escaping(&mut out).write_str(&text).unwrap();
            prop_assert!(!out.chars().any(misleads));
        }
    }
}
