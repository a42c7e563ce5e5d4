//! Switches of the kernel.

use super::{Scene, quoted};
use crate::backend::seen::filter::Part;
use crate::check::findings::{self, Findings, Severity};
use crate::list::List;
use crate::model::Family;

/// Fewer local ports than this are a proxy's bottleneck.
const PORTS: u32 = 1000;

pub(super) fn judge(scene: &Scene<'_>, found: &mut Findings) {
    forwarding(scene, found);
    reverse_path(scene, found);
    bridges(scene, found);
    to_loopback(scene, found);
    connections(scene, found);
    let sysctls = &scene.facts.sysctls;
    if let Some((first, last)) = sysctls.port_range()
        && last.saturating_sub(first) < PORTS
    {
        say!(found, Severity::Warning, findings::PORT_RANGE, "local ports are {first} to {last}");
    }
    if sysctls.number("ipv4/ip_early_demux") == Some(0) {
        say!(found, Severity::Note, findings::EARLY_DEMUX, "net.ipv4.ip_early_demux is 0");
    }
    let interfaces = scene.facts.interfaces.iter().map(|interface| interface.name.as_str());
    for name in interfaces
        .chain(["all"])
        .filter(|name| sysctls.of_interface(name, "accept_local").is_some_and(|value| value != 0))
    {
        say!(found, Severity::Note, findings::ACCEPT_LOCAL, "net.ipv4.conf.{name}.accept_local is 1");
    }
}

/// A host that intercepts what it would forward is a router, for the rest.
fn forwarding(scene: &Scene<'_>, found: &mut Findings) {
    let sysctls = &scene.facts.sysctls;
    // Who intercepts the host's own traffic may want no more.
    let for_others = scene.intercepts() && scene.instances.iter().all(|instance| instance.output_mark.is_none());
    let severity = if for_others { Severity::Warning } else { Severity::Note };
    if sysctls.number("ipv6/conf/all/forwarding") == Some(0) {
        say!(found, severity, findings::FORWARDING_V6, "net.ipv6.conf.all.forwarding is 0");
    }
    if sysctls.number("ipv4/ip_forward") == Some(0) {
        say!(found, severity, findings::IP_FORWARD, "net.ipv4.ip_forward is 0");
        return;
    }
    // A bridge's port forwards by the bridge.
    let outside = scene.facts.interfaces.iter().filter(|i| i.up && i.name != "lo" && i.master == 0);
    for name in outside.map(|interface| &interface.name) {
        if sysctls.of_interface(name, "forwarding") == Some(0) {
            say!(found, severity, findings::FORWARDING_INTERFACE, "net.ipv4.conf.{name}.forwarding is 0")
                .with("interface", &quoted(name));
        }
    }
}

/// Strict is no fault by itself; that it has dropped something is a sign.
fn reverse_path(scene: &Scene<'_>, found: &mut Findings) {
    const STRICT: u64 = 1;
    let sysctls = &scene.facts.sysctls;
    // The greater of both counts (`IN_DEV_RPFILTER`).
    let mode = |name: &str| sysctls.of_interface(name, "rp_filter").unwrap_or(0);
    let strict = |name: &&str| mode(name).max(mode("all")) == STRICT;
    let outside = scene.facts.interfaces.iter().map(|interface| interface.name.as_str());
    let names: Vec<&str> = outside.filter(|name| *name != "lo").filter(strict).list();
    let dropped = scene.facts.filtered_by_rp;
    if dropped > 0 && !names.is_empty() {
        let names = names.join(", ");
        found.say(
            Severity::Warning,
            findings::RP_FILTER,
            format_args!("rp_filter is strict on {names}, and has dropped {dropped} packets"),
        );
    }
}

fn bridges(scene: &Scene<'_>, found: &mut Findings) {
    let bridges: Vec<&str> =
        scene.facts.interfaces.iter().filter(|i| i.kind == "bridge").map(|interface| interface.name.as_str()).list();
    if bridges.is_empty() {
        return;
    }
    let families = [
        (Family::V4, findings::BRIDGE_V4, "bridge/bridge-nf-call-iptables"),
        (Family::V6, findings::BRIDGE_V6, "bridge/bridge-nf-call-ip6tables"),
    ];
    for (family, kind, path) in families {
        if scene.facts.sysctls.on(path) {
            let concerned = scene.interceptions.iter().any(|i| i.family == family && !i.nat);
            let severity = if concerned { Severity::Warning } else { Severity::Note };
            let name = path.replace('/', ".");
            say!(found, severity, kind, "net.{name} is 1, and there are bridges: {}", bridges.join(", "));
        }
    }
}

/// Translation to 127.0.0.1.
fn to_loopback(scene: &Scene<'_>, found: &mut Findings) {
    let sysctls = &scene.facts.sysctls;
    let mut parts = scene.facts.chains.iter().flatten().flat_map(|c| &c.rules).flat_map(|rule| &rule.parts);
    let translates = parts
        .any(|part| matches!(part, Part::TranslateDestination(Some(addr)) if addr.is_ipv4() && addr.is_loopback()));
    let outside = scene.facts.interfaces.iter().filter(|interface| interface.name != "lo");
    let names: Vec<&str> =
        outside.map(|i| i.name.as_str()).filter(|name| !sysctls.on_any(name, "route_localnet")).list();
    if translates && !names.is_empty() {
        let names = names.join(", ");
        found.say(
            Severity::Warning,
            findings::ROUTE_LOCALNET,
            format_args!("a rule translates destinations to 127.0.0.1, and route_localnet is 0 for {names}"),
        );
    }
}

/// How many connections are tracked, of how many that may be.
fn connections(scene: &Scene<'_>, found: &mut Findings) {
    let number = |name| scene.facts.sysctls.number(name);
    let counts = (number("netfilter/nf_conntrack_count"), number("netfilter/nf_conntrack_max"));
    let (Some(count), Some(max)) = counts else { return };
    if max > 0 && count >= max - max / 20 {
        let severity = if count >= max { Severity::Failure } else { Severity::Warning };
        say!(found, severity, findings::CONNTRACK_FULL, "{count} connections are tracked, and {max} may be")
            .with("max", &max.saturating_mul(2));
    }
}
