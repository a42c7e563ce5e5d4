//! The programs of iptables: run where the kernel has something of ours, or is to have, and checked against what it
//! has then.

use std::time::Duration;

use super::present::{self, Variant};
use super::saved::{self, Counter, Saved};
use super::{Table, instance_of};
use crate::error::{Error, Result};
use crate::model::Family;
use crate::program::{self, Outcome};
use crate::sys::{self, End};

/// A program is given so much time. (On a host with 100,000 rules it takes seconds.)
const TIME: Duration = Duration::from_secs(60);
/// How long a program of the legacy variant waits while another has the lock.
const LOCK_SECONDS: u32 = 5;
/// A comment, which `iptables-restore --verbose` prints when it has come to it: at the end, all before is in force.
const END_MARK: &str = "# libtproxy: this is the end";
/// What other programs change while it is read is read again, up to so many times.
const TRIES: usize = 5;
/// What iptables exits with if the real and the effective user are not the same (`xtables_init`).
const REFUSES_SETUID: i32 = 111;

/// Makes a family's tables hold these, and nothing else of the instance.
pub(super) fn apply(instance: &str, family: Family, wanted: &[Table]) -> Result<()> {
    let mut has = Vec::new();
    for variant in Variant::ALL {
        if Tool::of(family, variant).has(Some(instance))? {
            has.push(variant);
        }
    }
    // Where the instance is already, or else with the other rules of the host.
    let variant = match has.first() {
        Some(variant) => Some(*variant),
        None => present::variant_in_use(family)?,
    };
    Tool { family, variant }.replace(instance, wanted, !has.is_empty())?;
    has.iter().skip(1).try_for_each(|other| Tool::of(family, *other).replace(instance, &[], true))
}

/// Removes what a family's tables have of an instance.
pub(crate) fn remove(instance: &str, family: Family) -> Result<()> {
    for variant in Variant::ALL {
        let tool = Tool::of(family, variant);
        if tool.has(Some(instance))? {
            tool.replace(instance, &[], true)?;
        }
    }
    Ok(())
}

/// The instances that have rules in a family's tables: all of them, or the one of this name.
pub(crate) fn instances(family: Family, name: Option<&str>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for variant in Variant::ALL {
        let tool = Tool::of(family, variant);
        if tool.has(name)? {
            names.extend(saved::instances(&tool.list(&[])?));
        }
    }
    names.sort_unstable();
    names.dedup();
    names.retain(|instance| name.is_none_or(|name| name == instance));
    Ok(names)
}

/// The counters of an instance's rules. None at all: the family's tables have nothing of it.
pub(crate) fn counters(instance: &str, family: Family) -> Result<Vec<Counter>> {
    let mut counters = Vec::new();
    for variant in Variant::ALL {
        let tool = Tool::of(family, variant);
        if tool.has(Some(instance))? {
            let unreadable = || {
                Error::with(
                    libc::EPROTO,
                    format_args!("{}: a rule without its counters", tool.names("save").join(" or ")),
                )
            };
            counters.extend(saved::counters(&tool.list(&["--counters"])?, instance).ok_or_else(unreadable)?);
        }
    }
    Ok(counters)
}

/// The programs of a family, of one variant or (`None`) of the one that the host calls `iptables`.
struct Tool {
    family: Family,
    variant: Option<Variant>,
}

impl Tool {
    fn of(family: Family, variant: Variant) -> Tool {
        Tool { family, variant: Some(variant) }
    }

    /// The names that the program for an action may have. Before there were two variants, there was no name for either.
    fn names(&self, action: &str) -> Vec<String> {
        let base = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let plain = format!("{base}-{action}");
        match self.variant {
            Some(Variant::Legacy) => vec![format!("{base}-legacy-{action}"), plain],
            Some(Variant::Nft) => vec![format!("{base}-nft-{action}"), plain],
            None => vec![plain],
        }
    }

    /// The chains of ours that the kernel has.
    fn chains(&self) -> Result<Vec<(String, String)>> {
        let variants = Variant::ALL.into_iter().filter(|variant| self.variant.is_none_or(|only| only == *variant));
        let mut chains = Vec::new();
        for variant in variants {
            chains.extend(present::chains(self.family, variant)?);
        }
        chains.sort_unstable();
        chains.dedup();
        Ok(chains)
    }

    /// The kernel has chains of the instance, or (`None`) of any.
    fn has(&self, instance: Option<&str>) -> Result<bool> {
        Ok(self.chains()?.iter().any(|(_, chain)| instance.is_none() || instance_of(chain) == instance))
    }

    /// All that the program lists: no less than what the kernel has of ours.
    fn list(&self, options: &[&str]) -> Result<String> {
        let mut problem = String::new();
        for _ in 0..TRIES {
            let chains = self.chains()?;
            let ran = self.run("save", options, "")?;
            if !ran.may_have_succeeded() {
                return Err(ran.error());
            }
            let Some((table, chain)) = saved::missing(&ran.output, &chains) else { return Ok(ran.output) };
            problem = format!("{} does not list chain {chain} of table {table}, which the kernel has", ran.name);
            if self.chains()? == chains {
                let words = if ran.words.is_empty() { "" } else { "; it says: " };
                return Err(Error::with(libc::EIO, format_args!("{problem}{words}{}", ran.words)));
            }
        }
        Err(Error::with(
            libc::EAGAIN,
            format_args!("other programs change iptables without pause: {problem}; try again"),
        ))
    }

    /// Makes the tables hold these, and nothing else of the instance.
    fn replace(&self, instance: &str, wanted: &[Table], has: bool) -> Result<()> {
        let saved = if has { Saved::read(&self.list(&[])?, instance) } else { Saved::default() };
        let input = [&saved::restore(instance, wanted, &saved), END_MARK, "\n"].concat();
        let wait = format!("--wait={LOCK_SECONDS}");
        let ran = self.run("restore", &["--noflush", &wait, "--verbose"], &input)?;
        if !ran.may_have_succeeded() || !ran.output.lines().any(|line| line == END_MARK) {
            return Err(ran.error());
        }
        let names = |table: &Table| {
            table.chains.iter().map(|chain| (table.name.to_owned(), chain.name.clone())).collect::<Vec<_>>()
        };
        let mut wanted: Vec<(String, String)> = wanted.iter().flat_map(names).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut has = self.chains()?;
        has.retain(|(_, chain)| instance_of(chain) == Some(instance));
        if has == wanted {
            return Ok(());
        }
        let shown =
            |chains: &[(String, String)]| chains.iter().map(|(_, chain)| chain.as_str()).collect::<Vec<_>>().join(" ");
        Err(Error::with(
            libc::EIO,
            format_args!(
                "{} reported success, but the kernel has the chains \"{}\" instead of \"{}\"",
                ran.name,
                shown(&has),
                shown(&wanted)
            ),
        ))
    }

    /// Runs the program for an action.
    fn run(&self, action: &str, arguments: &[&str], input: &str) -> Result<Ran> {
        let names = self.names(action);
        for name in &names {
            match program::run(name, arguments, input, TIME) {
                Err(sys::Errno(libc::ENOENT)) => {}
                Err(e) => return Err(interrupted(name, e)),
                Ok(outcome) => return Ok(Ran::new(name, outcome)),
            }
        }
        Err(Error::with(
            libc::EOPNOTSUPP,
            format_args!(
                "there is no {} in {}; install the package iptables",
                names.join(" or "),
                program::DIRECTORIES.join(", ")
            ),
        ))
    }
}

/// The error for a program that could not be started, or was not waited for.
fn interrupted(name: &str, e: sys::Errno) -> Error {
    match e.0 {
        libc::ETIMEDOUT => {
            let seconds = TIME.as_secs();
            Error::with(e.0, format_args!("{name} did not end within {seconds} seconds, and was killed"))
        }
        libc::EFBIG => Error::with(e.0, format_args!("{name} was killed, because it printed more than 64 MiB")),
        _ => Error::io(format_args!("{name}"), e),
    }
}

/// What is known of a program that has ended.
struct Ran {
    name: String,
    end: End,
    output: String,
    /// What it printed as errors and warnings.
    words: String,
}

impl Ran {
    fn new(name: &str, outcome: Outcome) -> Ran {
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
        };
        let words = text(outcome.errors).trim().to_owned();
        Ran { name: name.to_owned(), end: outcome.end, output: text(outcome.output), words }
    }

    /// It succeeded, or the kernel does not say: then its output has to show it.
    fn may_have_succeeded(&self) -> bool {
        matches!(self.end, End::Exited(0) | End::Unknown)
    }

    /// The error for a program that has failed: its own words, and what to do.
    fn error(&self) -> Error {
        let says = |part: &str| self.words.contains(part);
        let (errno, advice) = if says("holding the xtables lock") || says("Can't lock") {
            let advice = format!(
                "another program, such as iptables or a firewall manager, has held the lock for {LOCK_SECONDS} seconds \
                 (`fuser -v /run/xtables.lock` names the process); try again"
            );
            (libc::EAGAIN, advice)
        } else if says("open lock file") {
            let advice = "the legacy iptables has to write /run/xtables.lock: run as root of this host, or in a mount \
                          namespace with a /run of its own";
            (libc::EPERM, advice.to_owned())
        } else if says("Permission denied") || says("must be root") {
            let advice =
                "a program that is run needs CAP_NET_ADMIN, which it gets from the user root or from the ambient set";
            (libc::EPERM, advice.to_owned())
        } else if says("No chain/target/match") || says("not supported") {
            let advice = "the kernel needs CONFIG_NETFILTER_XT_MATCH_SOCKET and _XT_TARGET_TPROXY (`modprobe xt_socket xt_TPROXY`)";
            (libc::EOPNOTSUPP, advice.to_owned())
        } else {
            match self.end {
                End::Exited(REFUSES_SETUID) if self.words.is_empty() => {
                    let advice = "it does not run while the real and the effective user differ, as in a set-user-ID program; call \
                                  setresuid(0, 0, 0) first";
                    (libc::EPERM, advice.to_owned())
                }
                End::Exited(0) | End::Unknown => (libc::EIO, "it ended before the end of its input".to_owned()),
                End::Exited(status) => (libc::EIO, format!("exit status {status}")),
                End::Killed(signal) => (libc::EIO, format!("it was killed by signal {signal}")),
            }
        };
        let words = if self.words.is_empty() { "" } else { "; " };
        Error::with(errno, format_args!("{}: {}{words}{advice}", self.name, self.words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(end: End, words: &str) -> Error {
        Ran::new("iptables-restore", Outcome { end, output: Vec::new(), errors: words.as_bytes().to_vec() }).error()
    }

    #[test]
    fn failure_of_program_gives_its_errno_and_advice() {
        for (words, status, errno, advice) in [
            ("Another app is currently holding the xtables lock.", 4, libc::EAGAIN, "fuser -v /run/xtables.lock"),
            ("Can't lock /run/xtables.lock", 4, libc::EAGAIN, "fuser -v /run/xtables.lock"),
            ("Fatal: can't open lock file /run/xtables.lock", 4, libc::EPERM, "write /run/xtables.lock"),
            ("Permission denied (you must be root)", 4, libc::EPERM, "CAP_NET_ADMIN"),
            ("Permission denied", 4, libc::EPERM, "CAP_NET_ADMIN"),
            ("you must be root", 4, libc::EPERM, "CAP_NET_ADMIN"),
            ("No chain/target/match by that name.", 1, libc::EOPNOTSUPP, "CONFIG_NETFILTER_XT_MATCH_SOCKET"),
            ("Extension socket revision 0 not supported, missing kernel module?", 1, libc::EOPNOTSUPP, "xt_TPROXY"),
            ("", 111, libc::EPERM, "setresuid(0, 0, 0)"),
            ("some words", 111, libc::EIO, "exit status 111"),
            ("", 2, libc::EIO, "exit status 2"),
            ("", 0, libc::EIO, "before the end of its input"),
        ] {
            let error = ran(End::Exited(status), words);
            assert_eq!(error.errno(), errno, "{error}");
            let sentence = error.to_string();
            assert!(sentence.starts_with("iptables-restore: ") && sentence.contains(advice), "{sentence}");
            assert!(
                sentence.contains(words) && sentence.contains("; ") == (!words.is_empty() || status == 111),
                "{sentence}"
            );
        }
        assert!(ran(End::Killed(9), "").to_string().contains("killed by signal 9"));
        assert!(ran(End::Unknown, "").to_string().contains("before the end of its input"));
    }

    #[test]
    fn program_that_was_killed_is_an_error_that_says_why() {
        for (errno, words) in [
            (libc::ETIMEDOUT, "did not end within 60 seconds"),
            (libc::EFBIG, "printed more than 64 MiB"),
            (libc::EMFILE, "Too many open files"),
        ] {
            let error = interrupted("iptables-save", sys::Errno(errno));
            assert_eq!(error.errno(), errno);
            assert!(error.to_string().starts_with("iptables-save") && error.to_string().contains(words), "{error}");
        }
    }
}
