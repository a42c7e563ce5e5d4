//! Checks of sysctls.

use super::Context;
use crate::check::findings::{self, Findings, Severity};
use crate::check::inspect::filter::{HookPoint, Part};
use crate::check::inspect::routing::Interface;
use crate::check::shell::{is_plain, word};
use crate::model::Family;

/// Minimum number of local ports without a warning.
const PORTS: u32 = 1000;

pub(super) fn check_sysctls(context: &Context<'_>, found: &mut Findings) {
    const SWITCH: &str = "accept_local";
    forwarding(context, found);
    reverse_path(context, found);
    bridges(context, found);
    to_loopback(context, found);
    connections(context, found);
    let sysctls = &context.host.sysctls;
    if let Some((first, last)) = sysctls.port_range()
        && last.saturating_sub(first) < PORTS
    {
        report!(found, Severity::Warning, findings::PORT_RANGE, "the local port range is {first} to {last}");
    }
    if sysctls.number("ipv4/ip_early_demux") == Some(0) {
        report!(found, Severity::Note, findings::EARLY_DEMUX, "net.ipv4.ip_early_demux is 0");
    }
    let interfaces =
        context.host.interfaces.iter().map(|interface| (interface.switch(SWITCH), interface.name.to_string()));
    for (value, name) in [(sysctls.of_all(SWITCH), "all".to_owned())].into_iter().chain(interfaces) {
        if value.is_some_and(|value| value != 0) {
            report!(found, Severity::Note, findings::ACCEPT_LOCAL, "net.ipv4.conf.{name}.accept_local is 1");
        }
    }
}

/// Returns the command that sets a sysctl of an interface, in the given directory below net. Empty: the name cannot be
/// written in a shell.
fn setting(directory: &str, interface: &Interface, switch: &str, value: u32) -> String {
    let name = &interface.name;
    let bytes = name.as_bytes();
    match word(name) {
        // In sysctl(8) a `=` ends the name, and a name that begins with `*` is a pattern.
        Some(word) if is_plain(name) && !bytes.contains(&b'=') => {
            format!("sysctl -w net/{directory}/conf/{word}/{switch}={value}")
        }
        Some(word) => format!("echo {value} >/proc/sys/net/{directory}/conf/{word}/{switch}"),
        None => String::new(),
    }
}

/// Maximum number of interfaces in a message.
const SHOWN: usize = 16;

fn listed(interfaces: &[&Interface]) -> String {
    let names: Vec<String> = interfaces.iter().take(SHOWN).map(|interface| interface.name.to_string()).collect();
    match interfaces.len().saturating_sub(SHOWN) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// Checks forwarding: a host that intercepts forwarded traffic must also forward the rest.
fn forwarding(context: &Context<'_>, found: &mut Findings) {
    let sysctls = &context.host.sysctls;
    // A host that intercepts its own traffic may not need to forward any.
    let for_others = context.intercepts() && context.instances.iter().all(|instance| instance.output_mark.is_none());
    let severity = if for_others { Severity::Warning } else { Severity::Note };
    // Only a host that intercepts the traffic of other hosts must be a router.
    if sysctls.number("ipv6/conf/all/forwarding") == Some(0) {
        let finding =
            report!(found, severity, findings::FORWARDING_V6, "net.ipv6.conf.all.forwarding is 0").without_fix();
        if for_others {
            // A router ignores router advertisements, and would lose the routes that it has from them.
            let outside = context.host.interfaces.iter().filter(|i| i.up && i.name != "lo" && i.accept_ra == Some(1));
            for interface in outside.take(SHOWN) {
                finding.and(format_args!("{}", setting("ipv6", interface, "accept_ra", 2)));
            }
            finding.and(format_args!("sysctl -w net.ipv6.conf.all.forwarding=1"));
        }
    }
    if sysctls.number("ipv4/ip_forward") == Some(0) {
        let finding = report!(found, severity, findings::IP_FORWARD, "net.ipv4.ip_forward is 0");
        if !for_others {
            finding.without_fix();
        }
        return;
    }
    // The ports of a bridge do not forward IP packets themselves.
    let outside = context.host.interfaces.iter().filter(|i| i.up && i.name != "lo" && i.master == 0);
    for interface in outside.filter(|interface| interface.switch("forwarding") == Some(0)) {
        let name = &interface.name;
        let finding = report!(found, severity, findings::FORWARDING_INTERFACE, "net.ipv4.conf.{name}.forwarding is 0");
        match for_others {
            true => finding.fix_with(format_args!("{}", setting("ipv4", interface, "forwarding", 1))),
            false => finding.without_fix(),
        };
    }
}

/// Reports a strict reverse-path filter only if it has dropped packets.
fn reverse_path(context: &Context<'_>, found: &mut Findings) {
    const STRICT: u64 = 1;
    const LOOSE: u32 = 2;
    let Some(dropped) = context.host.filtered_by_rp.filter(|dropped| *dropped > 0) else { return };
    // The kernel uses the greater of the two values (`IN_DEV_RPFILTER`).
    let Some(all) = context.host.sysctls.of_all("rp_filter") else { return };
    let strict = |interface: &&Interface| interface.switch("rp_filter").is_some_and(|own| own.max(all) == STRICT);
    let outside = context.host.interfaces.iter().filter(|interface| interface.name != "lo");
    let strict: Vec<&Interface> = outside.filter(strict).collect();
    if strict.is_empty() {
        return;
    }
    let names = listed(&strict);
    let finding = found.push(
        Severity::Warning,
        findings::RP_FILTER,
        format_args!("rp_filter is strict on {names}, and has dropped {dropped} packets"),
    );
    // Only for these interfaces: others may have no filter at all.
    finding.without_fix();
    for interface in strict.iter().take(SHOWN) {
        finding.and(format_args!("{}", setting("ipv4", interface, "rp_filter", LOOSE)));
    }
}

fn bridges(context: &Context<'_>, found: &mut Findings) {
    let bridges: Vec<&Interface> = context.host.interfaces.iter().filter(|i| i.kind == "bridge").collect();
    if bridges.is_empty() {
        return;
    }
    let families = [
        (Family::V4, findings::BRIDGE_V4, "bridge/bridge-nf-call-iptables"),
        (Family::V6, findings::BRIDGE_V6, "bridge/bridge-nf-call-ip6tables"),
    ];
    // Other programs may have rules for bridged packets.
    let filtered = context.others().any(|chain| {
        chain.hook.is_some_and(|hook| hook.point == HookPoint::Forward) && (chain.drops || !chain.rules.is_empty())
    });
    for (family, kind, path) in families {
        if context.host.sysctls.is_on(path) == Some(true) {
            let concerned = context.interceptions.iter().any(|i| i.family == family && !i.nat);
            let severity = if concerned { Severity::Warning } else { Severity::Note };
            let name = path.replace('/', ".");
            let finding =
                report!(found, severity, kind, "net.{name} is 1, and these bridges exist: {}", listed(&bridges));
            if filtered || !concerned {
                finding.without_fix();
            }
        }
    }
}

/// Checks the translation of destinations to 127.0.0.1.
fn to_loopback(context: &Context<'_>, found: &mut Findings) {
    let sysctls = &context.host.sysctls;
    let mut parts = context.rules().flat_map(|(_, rule)| &rule.parts);
    let translates = parts
        .any(|part| matches!(part, Part::TranslateDestination(Some(addr)) if addr.is_ipv4() && addr.is_loopback()));
    let outside = context.host.interfaces.iter().filter(|interface| interface.name != "lo");
    let off: Vec<&Interface> =
        outside.filter(|interface| sysctls.is_on_any(interface, "route_localnet") == Some(false)).collect();
    if translates && !off.is_empty() {
        let names = listed(&off);
        let finding = found.push(
            Severity::Warning,
            findings::ROUTE_LOCALNET,
            format_args!("a rule translates destinations to 127.0.0.1, and route_localnet is 0 for {names}"),
        );
        if let Some(iptables) = context.host.iptables.first() {
            finding
                .fix_with(format_args!("{iptables} -t raw -I PREROUTING ! -i lo -d 127.0.0.0/8 -j DROP"))
                .and(format_args!("sysctl -w net.ipv4.conf.all.route_localnet=1"));
        }
    }
}

/// Checks the number of tracked connections against its limit.
fn connections(context: &Context<'_>, found: &mut Findings) {
    let number = |name| context.host.sysctls.number(name);
    let counts = (number("netfilter/nf_conntrack_count"), number("netfilter/nf_conntrack_max"));
    let (Some(count), Some(max)) = counts else { return };
    if max > 0 && count >= max - max / 20 {
        let severity = if count >= max { Severity::Failure } else { Severity::Warning };
        report!(found, severity, findings::CONNTRACK_FULL, "{count} connections are tracked, and the limit is {max}")
            .with("max", &max.saturating_mul(2));
    }
}
