//! Switches of the kernel.

use super::{Scene, quoted};
use crate::backend::seen::filter::Part;
use crate::check::findings::{self, Finding, Kind, Severity};
use crate::model::Family;

/// Fewer local ports than this are a proxy's bottleneck.
const PORTS: u32 = 1000;

pub(super) fn judge(scene: &Scene<'_>) -> Vec<Finding> {
    let mut found = forwarding(scene);
    found.extend(reverse_path(scene));
    found.extend(bridges(scene));
    found.extend(to_loopback(scene));
    found.extend(connections(scene));
    let sysctls = &scene.facts.sysctls;
    if let Some((first, last)) = sysctls.port_range()
        && last.saturating_sub(first) < PORTS
    {
        let words = format!("local ports are {first} to {last}");
        found.push(Finding::new(Severity::Warning, findings::PORT_RANGE, words));
    }
    if sysctls.number("ipv4/ip_early_demux") == Some(0) {
        found.push(Finding::new(Severity::Note, findings::EARLY_DEMUX, "net.ipv4.ip_early_demux is 0"));
    }
    let outside = scene.facts.interfaces.iter().map(|interface| interface.name.as_str());
    for name in outside.chain(["all"]).filter(|name| sysctls.on(&format!("ipv4/conf/{name}/accept_local"))) {
        let words = format!("net.ipv4.conf.{name}.accept_local is 1");
        found.push(Finding::new(Severity::Note, findings::ACCEPT_LOCAL, words));
    }
    found
}

/// A host that intercepts what it would forward is a router, for the rest.
fn forwarding(scene: &Scene<'_>) -> Vec<Finding> {
    let sysctls = &scene.facts.sysctls;
    // Who intercepts the host's own traffic may want no more.
    let for_others = scene.intercepts() && scene.instances.iter().all(|instance| instance.output_mark.is_none());
    let severity = if for_others { Severity::Warning } else { Severity::Note };
    let finding = |kind: &'static Kind, words: String| Finding::new(severity, kind, words);
    let mut found = Vec::new();
    if sysctls.number("ipv6/conf/all/forwarding") == Some(0) {
        found.push(finding(findings::FORWARDING_V6, "net.ipv6.conf.all.forwarding is 0".to_owned()));
    }
    if sysctls.number("ipv4/ip_forward") == Some(0) {
        found.push(finding(findings::IP_FORWARD, "net.ipv4.ip_forward is 0".to_owned()));
        return found;
    }
    // A bridge's port forwards by the bridge.
    let outside = scene.facts.interfaces.iter().filter(|i| i.up && i.name != "lo" && i.master == 0);
    for name in outside.map(|interface| &interface.name) {
        if sysctls.number(&format!("ipv4/conf/{name}/forwarding")) == Some(0) {
            let words = format!("net.ipv4.conf.{name}.forwarding is 0");
            found.push(finding(findings::FORWARDING_INTERFACE, words).with("interface", quoted(name)));
        }
    }
    found
}

/// Strict is no fault by itself; that it has dropped something is a sign.
fn reverse_path(scene: &Scene<'_>) -> Option<Finding> {
    const STRICT: u64 = 1;
    let sysctls = &scene.facts.sysctls;
    // The greater of both counts (`IN_DEV_RPFILTER`).
    let mode = |name: &str| sysctls.number(&format!("ipv4/conf/{name}/rp_filter")).unwrap_or(0);
    let strict = |name: &&str| mode(name).max(mode("all")) == STRICT;
    let outside = scene.facts.interfaces.iter().map(|interface| interface.name.as_str());
    let names: Vec<&str> = outside.filter(|name| *name != "lo").filter(strict).collect();
    if scene.facts.filtered_by_rp == 0 || names.is_empty() {
        return None;
    }
    let words =
        format!("rp_filter is strict on {}, and has dropped {} packets", names.join(", "), scene.facts.filtered_by_rp);
    Some(Finding::new(Severity::Warning, findings::RP_FILTER, words))
}

fn bridges(scene: &Scene<'_>) -> Vec<Finding> {
    let bridges: Vec<&str> =
        scene.facts.interfaces.iter().filter(|i| i.kind == "bridge").map(|interface| interface.name.as_str()).collect();
    if bridges.is_empty() {
        return Vec::new();
    }
    let families = [
        (Family::V4, findings::BRIDGE_V4, "bridge/bridge-nf-call-iptables"),
        (Family::V6, findings::BRIDGE_V6, "bridge/bridge-nf-call-ip6tables"),
    ];
    let on = families.into_iter().filter(|(_, _, path)| scene.facts.sysctls.on(path));
    on.map(|(family, kind, path)| {
        let concerned = scene.interceptions.iter().any(|i| i.family == family && !i.nat);
        let severity = if concerned { Severity::Warning } else { Severity::Note };
        Finding::new(
            severity,
            kind,
            format!("net.{} is 1, and there are bridges: {}", path.replace('/', "."), bridges.join(", ")),
        )
    })
    .collect()
}

/// Translation to 127.0.0.1.
fn to_loopback(scene: &Scene<'_>) -> Option<Finding> {
    let sysctls = &scene.facts.sysctls;
    let mut parts = scene.facts.chains.iter().flatten().flat_map(|c| &c.rules).flat_map(|rule| &rule.parts);
    let translates = parts
        .any(|part| matches!(part, Part::TranslateDestination(Some(addr)) if addr.is_ipv4() && addr.is_loopback()));
    let outside = scene.facts.interfaces.iter().filter(|interface| interface.name != "lo");
    let names: Vec<&str> =
        outside.map(|i| i.name.as_str()).filter(|name| !sysctls.on_any(name, "route_localnet")).collect();
    if !translates || names.is_empty() {
        return None;
    }
    let words =
        format!("a rule translates destinations to 127.0.0.1, and route_localnet is 0 for {}", names.join(", "));
    Some(Finding::new(Severity::Warning, findings::ROUTE_LOCALNET, words))
}

/// How many connections are tracked, of how many that may be.
fn connections(scene: &Scene<'_>) -> Option<Finding> {
    let sysctls = &scene.facts.sysctls;
    let (count, max) = (sysctls.number("netfilter/nf_conntrack_count")?, sysctls.number("netfilter/nf_conntrack_max")?);
    if max == 0 || count < max - max / 20 {
        return None;
    }
    let severity = if count >= max { Severity::Failure } else { Severity::Warning };
    let words = format!("{count} connections are tracked, and {max} may be");
    Some(Finding::new(severity, findings::CONNTRACK_FULL, words).with("max", max.saturating_mul(2)))
}
