//! The text that `iptables-save` writes and `iptables-restore` reads.

use std::fmt::Write;

use super::{Table, chain_name, instance_of};
use crate::backend::xtables::comment;

/// The chains of an instance, and the jumps to them as they are listed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Saved {
    /// Table and chain.
    chains: Vec<(String, String)>,
    /// Table, and the rule behind `-A`.
    jumps: Vec<(String, String)>,
}

impl Saved {
    /// Reads the output of `iptables-save`.
    pub fn read(save: &str, instance: &str) -> Saved {
        let mut saved = Saved::default();
        let prefix = chain_name(instance, "");
        for (table, line) in lines(save) {
            if let Some(chain) = declared(line) {
                // Parts have no '-': the chain is not of an instance whose name is longer.
                if chain.strip_prefix(&prefix).is_some_and(|part| !part.contains('-')) {
                    saved.chains.push((table.to_owned(), chain.to_owned()));
                }
            } else if let Some(rule) = line.strip_prefix("-A ")
                && target_of(rule) == Some(instance)
            {
                saved.jumps.push((table.to_owned(), rule.to_owned()));
            }
        }
        saved.chains.sort_unstable();
        saved.chains.dedup();
        saved.jumps.sort_unstable();
        saved.jumps.dedup();
        saved
    }
}

/// The lines of each table that is listed to its end, with the table's name.
fn lines(save: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut found = Vec::new();
    let (mut table, mut lines) = ("", Vec::new());
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            (table, lines) = (name, Vec::new());
        } else if line == "COMMIT" {
            found.append(&mut lines);
        } else {
            lines.push((table, line));
        }
    }
    found.into_iter()
}

/// The chain that a line declares.
fn declared(line: &str) -> Option<&str> {
    line.strip_prefix(':')?.split(' ').next()
}

/// The instance that a rule is a jump to: its comment says so, and it leads to a chain of the instance.
fn target_of(rule: &str) -> Option<&str> {
    let (_, rest) = rule.split_once("--comment \"libtproxy ")?;
    let (instance, rest) = rest.split_once('"')?;
    (instance_of(rest.strip_prefix(" -j ")?)? == instance).then_some(instance)
}

/// The instances that have jumps. The name of a chain alone is no proof: another program may use the same.
pub(super) fn instances(save: &str) -> Vec<String> {
    let mut names =
        lines(save).filter_map(|(_, line)| Some(target_of(line.strip_prefix("-A ")?)?.to_owned())).collect::<Vec<_>>();
    names.sort_unstable();
    names.dedup();
    names
}

/// The first of these chains (each with its table) that is not listed.
pub(super) fn missing<'a>(save: &str, chains: &'a [(String, String)]) -> Option<&'a (String, String)> {
    let mut listed: Vec<(String, String)> =
        lines(save).filter_map(|(table, line)| Some((table.to_owned(), declared(line)?.to_owned()))).collect();
    listed.sort_unstable();
    listed.dedup();
    chains.iter().find(|chain| listed.binary_search(chain).is_err())
}

/// What a rule of an instance has counted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Counter {
    /// The part of the instance that the chain is.
    pub part: String,
    /// The rule, without the chain.
    pub rule: String,
    pub packets: u64,
    pub bytes: u64,
}

/// The counters of an instance's rules; `None`: a rule of it without.
pub(super) fn counters(save: &str, instance: &str) -> Option<Vec<Counter>> {
    let prefix = chain_name(instance, "");
    let mut counters = Vec::new();
    for (_, line) in lines(save) {
        let Some((before, rule)) = line.split_once("-A ") else { continue };
        let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
        let Some(part) = chain.strip_prefix(&prefix).filter(|part| !part.contains('-')) else { continue };
        let (packets, bytes) = before.strip_prefix('[')?.strip_suffix("] ")?.split_once(':')?;
        counters.push(Counter {
            part: part.to_owned(),
            rule: rule.to_owned(),
            packets: packets.parse().ok()?,
            bytes: bytes.parse().ok()?,
        });
    }
    Some(counters)
}

/// The input for `iptables-restore --noflush` that makes a family's tables hold the plan (or, without one, nothing of
/// the instance), whatever they held of it.
pub(super) fn restore(instance: &str, wanted: &[Table], found: &Saved) -> String {
    let mut text = String::new();
    let found_in = found.chains.iter().chain(&found.jumps).map(|(table, _)| table.clone());
    let mut names: Vec<String> = wanted.iter().map(|table| table.name.to_owned()).chain(found_in).collect();
    names.sort_unstable();
    names.dedup();
    for table_name in names {
        // Writing to a String does not fail.
        let _ = writeln!(text, "*{table_name}");
        let stale = found.chains.iter().filter(|(table, _)| *table == table_name).map(|(_, chain)| chain);
        let table = wanted.iter().find(|table| table.name == table_name);
        let chains = table.map_or(&[][..], |table| &table.chains);
        let gone: Vec<&String> = stale.filter(|chain| !chains.iter().any(|new| new.name == **chain)).collect();
        // To declare a chain makes it, or empties it.
        for chain in chains.iter().map(|chain| &chain.name).chain(gone.iter().copied()) {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        for (_, jump) in found.jumps.iter().filter(|(table, _)| *table == table_name) {
            let _ = writeln!(text, "-D {jump}");
        }
        for chain in chains {
            text.push_str(&chain.rules);
        }
        for (from, to) in table.map_or(&[][..], |table| &table.jumps) {
            let _ = writeln!(text, "-A {from} -m comment --comment \"{}\" -j {to}", comment(instance));
        }
        for chain in gone {
            let _ = writeln!(text, "-X {chain}");
        }
        text.push_str("COMMIT\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAVE: &str = "# Generated by iptables-save\n*mangle\n:PREROUTING ACCEPT [0:0]\n:tp-a-p - [0:0]\n:tp-a-b-p - [0:0]\n\
                        [3:120] -A PREROUTING -m comment --comment \"libtproxy a\" -j tp-a-p\n\
                        [1:60] -A tp-a-p -p tcp -j DROP\nCOMMIT\n*nat\n:tp-a-p - [0:0]\n";

    fn named(table: &str, chain: &str) -> (String, String) {
        (table.to_owned(), chain.to_owned())
    }

    #[test]
    fn saved_table_without_end_counts_as_not_listed() {
        assert_eq!(Saved::read(SAVE, "a").chains, [named("mangle", "tp-a-p")]);
        assert_eq!(Saved::read(SAVE, "a-b").chains, [named("mangle", "tp-a-b-p")]);
        let chains = [named("mangle", "tp-a-p"), named("nat", "tp-a-p")];
        assert_eq!(missing(SAVE, &chains), Some(&chains[1]));
        assert_eq!(missing(SAVE, &chains[..1]), None);
    }

    #[test]
    fn saved_counters_are_of_the_chains_of_the_instance() {
        let counter = Counter { part: "p".to_owned(), rule: "-p tcp -j DROP".to_owned(), packets: 1, bytes: 60 };
        assert_eq!(counters(SAVE, "a"), Some(vec![counter]));
        assert_eq!(counters(SAVE, "other"), Some(Vec::new()));
        assert_eq!(counters(&SAVE.replace("[1:60] ", ""), "a"), None);
        assert_eq!(counters(&SAVE.replace("[1:60]", "[1:99999999999999999999]"), "a"), None);
    }

    proptest! {
        #[test]
        fn saved_of_any_text_does_not_panic(text in "(\\*mangle\n|COMMIT\n|:tp-a-p|-A |tp-a-|\\[1:2\\] |libtproxy a|--comment \"| -j |\"|.|\n){0,40}") {
            let saved = Saved::read(&text, "a");
            restore("a", &[], &saved);
            instances(&text);
            counters(&text, "a");
            missing(&text, &saved.chains);
        }
    }
}
