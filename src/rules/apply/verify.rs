//! Whether installed rules still work: other programs can remove their routing, put rules of their own before it, and close
//! the listener.

use super::*;
use crate::backend::sockets::{self, Listeners};
use crate::model::Family;
use crate::plan::Intercept;

impl Instance {
    /// Checks that the rules are as they were installed. `repair`: puts back routing that is missing or overtaken.
    pub fn verify(&mut self, repair: bool) -> Result<()> {
        self.require_table()?;
        if !self.is_current() {
            return Err(Error::new(
                libc::ESTALE,
                "the process that installed the rules has changed them since this process was forked, so that they are not \
                 known here: call tp_replace_rules first",
            ));
        }
        if self.installed == Installed::Iptables {
            self.counted()?;
        }
        match self.verify_routing() {
            Err(stale) if repair && stale.errno() == libc::ESTALE => {
                self.repair()?;
                self.verify_routing()?;
            }
            verified => verified?,
        }
        self.verify_listeners()
    }

    fn verify_routing(&mut self) -> Result<()> {
        let found = route::rules(&mut self.route, Families::ALL)?;
        if let Some(missing) = route::missing(&mut self.route, &self.routing, &found)?.first() {
            return Err(Error::with(
                libc::ESTALE,
                format_args!(
                    "routing of these rules is missing (`ip {}`), so that packets time out: call tp_verify_rules with \
                     TP_VERIFY_REPAIR",
                    missing.addition()
                ),
            ));
        }
        if let Some(rule) = slot::overtaking(&self.plan, self.slot(), &found) {
            let fix = match self.plan.priority {
                None => "call tp_verify_rules with TP_VERIFY_REPAIR, which moves the rules ahead if there is room",
                Some(_) => "call tp_replace_rules with another priority",
            };
            return Err(Error::with(
                libc::ESTALE,
                format_args!(
                    "the {} routing rule of another program at {} (`ip rule`) may take packets before those of these rules at \
                     {}: {fix}",
                    rule.family, rule.priority, self.routing.priority
                ),
            ));
        }
        if !self.routing.blocked.is_empty() {
            return Err(Error::new(
                libc::ESTALE,
                "IPv6 was disabled on lo when these rules were installed, and they drop it: enable it (`sysctl \
                 net.ipv6.conf.lo.disable_ipv6=0`), then call tp_verify_rules with TP_VERIFY_REPAIR",
            ));
        }
        Ok(())
    }

    fn repair(&mut self) -> Result<()> {
        let mut plan = self.plan.clone();
        let blocked = is_ipv6_blocked(&mut plan, &mut self.route)?;
        self.changing(|rules| {
            rules.move_for(plan, blocked, |rules, plan, routing| {
                let before = route::rules(&mut rules.route, Families::ALL)?;
                route::add_missing(&mut rules.route, &routing, &before)?;
                (rules.plan, rules.routing) = (plan, routing);
                rules.delete_surplus(&before);
                Ok(())
            })
        })
    }

    /// Checks that a socket listens where the rules deliver.
    fn verify_listeners(&self) -> Result<()> {
        if self.plan.intercepts.is_empty() {
            return Ok(());
        }
        let read = || sockets::listeners().map_err(|e| Error::io(format_args!("sock_diag"), e));
        let listeners = self.in_its_network(read)?;
        for intercept in &self.plan.intercepts {
            let served = |family: &Family| intercept.family.is_none_or(|only| only == *family);
            for family in self.plan.families.iter().filter(served) {
                if listeners.knows(intercept.protocol) && !self.has_listener(&listeners, intercept, family) {
                    return Err(Error::with(
                        libc::ENOTCONN,
                        format_args!(
                            "no socket receives the intercepted {} packets of {family} at port {}: start the listener",
                            intercept.protocol, intercept.port
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    fn has_listener(&self, listeners: &Listeners, intercept: &Intercept, family: Family) -> bool {
        listeners.found.iter().any(|listener| {
            let addr = match (intercept.addr, listener.addr) {
                (Some(wanted), Some(addr)) => wanted.to_canonical() == addr.to_canonical(),
                _ => true,
            };
            listener.protocol == intercept.protocol
                && listener.port == intercept.port
                && listener.serves(family)
                && (self.plan.mode == Mode::Redirect || listener.transparent != Some(false))
                && addr
        })
    }
}
