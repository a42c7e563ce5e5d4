//! Quotes names of other programs for sh(1) and JSON. Any name becomes one word, and the command consists of printable ASCII.

use std::fmt::Write;

use crate::name::Name;

/// Writing to a String does not fail.
macro_rules! put {
    ($to:expr, $($words:tt)+) => {{ let _ = write!($to, $($words)+); }};
}

/// Whether a name has no special meaning to a shell and to the programs that it is passed to.
pub(super) fn is_plain(name: &Name) -> bool {
    let bytes = name.as_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-./@+:,=%".contains(byte);
    !bytes.is_empty() && !bytes.starts_with(b"-") && bytes.iter().all(plain)
}

/// Whether a name is an identifier in the language of `nft` (`string` in its scanner.l).
pub(super) fn is_nft_identifier(name: &Name) -> bool {
    let bytes = name.as_bytes();
    let first = |byte: &u8| byte.is_ascii_alphabetic() || b"_.".contains(byte);
    bytes.first().is_some_and(first) && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"/-_.".contains(byte))
}

/// Quotes a name for a shell. `None`: no POSIX shell can express it as a word (a name that ends with a newline).
pub(super) fn word(name: &Name) -> Option<String> {
    let bytes = name.as_bytes();
    if is_plain(name) {
        return name.as_str().map(str::to_owned);
    }
    let mut word = String::new();
    if bytes.iter().all(|byte| (b' '..=b'~').contains(byte)) {
        word.push('\'');
        for byte in bytes {
            match byte {
                b'\'' => word.push_str("'\\''"),
                byte => word.push(char::from(*byte)),
            }
        }
        word.push('\'');
        return Some(word);
    }
    if bytes.ends_with(b"\n") {
        return None;
    }
    // printf has octal escapes in every shell. Every character that is not a letter or digit is escaped, because it may be special
    // to the shell or to printf.
    word.push_str("\"$(printf '");
    for byte in bytes {
        match byte {
            byte if byte.is_ascii_alphanumeric() => word.push(char::from(*byte)),
            byte => put!(word, "\\{byte:03o}"),
        }
    }
    word.push_str("')\"");
    Some(word)
}

/// Quotes a name as a JSON string without characters that are special to a shell or a terminal. `None`: it is not UTF-8.
pub(super) fn json(name: &Name) -> Option<String> {
    let mut string = String::from("\"");
    for unit in name.as_str()?.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii_alphanumeric() || b" _-./:".contains(&byte) => string.push(char::from(byte)),
            _ => put!(string, "\\u{unit:04x}"),
        }
    }
    string.push('"');
    Some(string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    /// Returns the bytes that a shell reads from a word.
    fn said_by_shell(word: &str) -> Vec<u8> {
        let script = format!("printf %s {word}");
        std::process::Command::new("sh").args(["-c", &script]).output().unwrap().stdout
    }

    #[test]
    fn shell_word_is_the_name() {
        for (name, expected) in [
            (&b"eth0.7"[..], "eth0.7"),
            (b"$(reboot)", "'$(reboot)'"),
            (b"a'b", "'a'\\''b'"),
            (b"-x", "'-x'"),
            (b"", "''"),
            (b"a\xff", "\"$(printf 'a\\377')\""),
            (b"%s\\\x1b", "\"$(printf '\\045s\\134\\033')\""),
        ] {
            let word = word(&Name::new(name)).unwrap();
            assert_eq!(word, expected);
            assert_eq!(said_by_shell(&word), name);
        }
        assert_eq!(word(&Name::new(b"a\n")), None);
    }

    #[test]
    fn json_of_any_name_is_ascii() {
        assert_eq!(
            json(&Name::from("a\u{202e}b 'x\"\n\u{1f600}")).unwrap(),
            r#""a\u202eb \u0027x\u0022\u000a\ud83d\ude00""#
        );
        assert_eq!(json(&Name::new(b"a\xff")), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn shell_word_of_any_name_is_one_word(bytes in proptest::collection::vec(prop_oneof![1..=127u8, 1..=255u8], 0..40)) {
            let name = Name::new(&bytes);
            let Some(word) = word(&name) else { return Ok(()) };
            prop_assert!(word.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            let output = std::process::Command::new("sh").args(["-c", &format!("printf %s {word}")]).output().unwrap();
            prop_assert!(output.status.success());
            prop_assert_eq!(std::ffi::OsStr::from_bytes(&output.stdout), std::ffi::OsStr::from_bytes(&bytes));
        }
    }
}
