//! Who may use installed rules: one thread at a time, and of the processes that hold a copy of the handle the one that
//! installed them, or a child of it once that has ended.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use super::apply::{Instance, Set, Stats};
use super::config::Config;
use crate::error::{Error, Result};
use crate::prefix::Prefix;
use crate::process::{Descriptor, ForkGuard, ForkMutex, LockedAtFork, Maker, Relation};

/// Rules that are installed. They end with [`Rules::remove`], with this value
/// (unless they persist), or with the process, whichever comes first.
///
/// Several threads may use one value. A forked child gets a copy: while the process that installed the rules lives, the
/// copy's methods fail with EBUSY, and dropping or removing it removes nothing. After that process has ended, executed
/// another program or closed its descriptors, a child may use the copy, but no two children at the same time. If another
/// process has changed the rules since the fork, [`Rules::update`] fails with ESTALE until [`Rules::replace`] was called.
pub struct Rules {
    installer: Maker,
    /// The sockets of the instance: to be closed where it cannot be touched.
    sockets: Vec<Descriptor>,
    /// `None` while the value is being dropped.
    instance: Option<ForkMutex<Instance>>,
}

impl Rules {
    /// Makes the kernel deliver to the listeners what the config asks for.
    ///
    /// On failure nothing is left.
    ///
    /// ```no_run
    /// use tproxy::rules::{Config, Listener, Protocol, Rules};
    ///
    /// // A listener in another process.
    /// let listener = Listener::at("[::]:3129".parse()?, Protocol::Tcp)?;
    /// let rules = Rules::install(&Config::new([listener]).ports([80, 443]).interfaces(["eth0"]))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn install(config: &Config) -> Result<Rules> {
        let instance = Instance::install(config)?;
        let sockets = instance.sockets().filter_map(Descriptor::of).collect();
        Ok(Rules { installer: Maker::new(), sockets, instance: Some(ForkMutex::new(instance)) })
    }

    /// Replaces what is asked for: every packet is treated by the old rules or by the new.
    ///
    /// The name stays, and so do the routing table and the preferences. On failure the old rules are as they were.
    ///
    /// ```no_run
    /// use tproxy::rules::{Config, Listener, Rules};
    /// # fn example(rules: &Rules, listener: Listener) -> Result<(), tproxy::Error> {
    /// rules.replace(&Config::new([listener]).ports([80, 443, 8080]))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn replace(&self, config: &Config) -> Result<()> {
        self.lock()?.replace(config)
    }

    /// Adds and removes prefixes of a set, in one transaction, while the rules work.
    ///
    /// The set must be there: `dst` and `src` are if the config has them, empty or not, `bypass` always is (but not with
    /// [`Mode::DivertOnly`](super::Mode::DivertOnly)).
    ///
    /// What it costs does not grow with the set. Once in a while it takes as long as [`Rules::replace`]: when so many
    /// prefixes of a length have come that they get a set of their own.
    ///
    /// ```no_run
    /// use tproxy::rules::{Rules, Set};
    /// # fn example(rules: &Rules) -> Result<(), tproxy::Error> {
    /// rules.update(Set::Bypass, &["192.0.2.0/24".parse()?], &[])?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn update(&self, set: Set, add: &[Prefix], remove: &[Prefix]) -> Result<()> {
        self.lock()?.update(set, add, remove)
    }

    /// Adds addresses to a set for a time, after which they leave it by themselves: what a DNS server answered, for the
    /// TTL of the answer. An address that was learned before gets the new time.
    ///
    /// The set is [`Set::Dst`], which the config must have, empty or not, or [`Set::Bypass`]. Learned addresses are kept beside
    /// the prefixes of the config, at most 1,000,000 of a family (ENOSPC), and stay when the rules are replaced. The time is
    /// rounded up to milliseconds. EOPNOTSUPP: the rules are those of iptables.
    ///
    /// What it costs does not grow with the set. The first call for a set and family takes as long as [`Rules::replace`].
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use tproxy::rules::{Rules, Set};
    /// # fn example(rules: &Rules) -> Result<(), Box<dyn std::error::Error>> {
    /// rules.learn(Set::Dst, &["192.0.2.7".parse()?], Duration::from_secs(300))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn learn(&self, set: Set, addrs: &[IpAddr], ttl: Duration) -> Result<()> {
        self.lock()?.learn(set, addrs, ttl)
    }

    /// Checks that the rules are as they were installed.
    ///
    /// ENOENT: the table is gone. ESTALE: routing is missing, or a routing rule of another program may take packets first, or
    /// IPv6 could not be routed when the rules were installed. ENOTCONN: no socket receives what the rules intercept.
    /// [`Rules::repair`] fixes routing.
    ///
    /// ```no_run
    /// # fn example(rules: &tproxy::rules::Rules) -> Result<(), tproxy::Error> {
    /// if let Err(error) = rules.verify() {
    ///     eprintln!("{error}");
    ///     rules.repair()?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn verify(&self) -> Result<()> {
        self.lock()?.verify(false)
    }

    /// Puts back routing that is missing, or that a routing rule of another program has overtaken, and then is
    /// [`Rules::verify`].
    pub fn repair(&self) -> Result<()> {
        self.lock()?.verify(true)
    }

    /// What the rules have done so far.
    ///
    /// ```no_run
    /// # fn example(rules: &tproxy::rules::Rules) -> Result<(), tproxy::Error> {
    /// let stats = rules.stats()?;
    /// println!("{} packets intercepted, {} dropped", stats.intercepted.packets, stats.dropped.packets);
    /// # Ok(())
    /// # }
    /// ```
    pub fn stats(&self) -> Result<Stats> {
        self.lock()?.stats()
    }

    /// Removes the rules, the routing, the table, and what they did.
    ///
    /// The routing goes first, while the table still holds its place against others: for that moment the packets that
    /// would be intercepted are dropped. In a child of the process that installed them, while that lives, nothing is
    /// removed.
    ///
    /// ```no_run
    /// # fn example(rules: tproxy::rules::Rules) -> Result<(), tproxy::Error> {
    /// rules.remove()?; // Dropping the value removes them too, but does not say whether that failed.
    /// # Ok(())
    /// # }
    /// ```
    pub fn remove(mut self) -> Result<()> {
        self.end(true)
    }

    /// Gives up this copy of the rules and removes nothing: for a forked child. Closes its copies of the descriptors.
    pub fn forget(mut self) {
        let instance = self.instance.take().map(ForkMutex::into_inner);
        if let Some(Err(LockedAtFork)) = instance {
            self.close_sockets();
        }
    }

    /// Of an instance that a thread of another process had locked, and which is left as it is.
    fn close_sockets(&mut self) {
        self.sockets.drain(..).for_each(Descriptor::close);
    }

    fn lock(&self) -> Result<ForkGuard<'_, Instance>> {
        if self.installer.relation() == Relation::ChildOfLiving {
            return Err(Error::with(
                libc::EBUSY,
                format_args!(
                    "the rules belong to process {}, which installed them and lives; this process is a child of it: call \
                     tp_read_stats for the counters, and tp_forget_rules to give up this copy of the handle",
                    self.installer.pid
                ),
            ));
        }
        let locked = self.instance.as_ref().map(ForkMutex::lock);
        let Some(Ok(mut instance)) = locked else {
            return Err(Error::new(
                libc::EDEADLK,
                "another thread was using the rules when this process was forked, so that their state is not known here: \
                 call tp_forget_rules, and install rules of this process's own",
            ));
        };
        if !instance.has_its_sockets() {
            return Err(closed(instance.name()));
        }
        instance.take_channels();
        Ok(instance)
    }

    /// Endpoints this copy; removes the rules if that is this process's to do, and they are not to stay.
    fn end(&mut self, even_if_persistent: bool) -> Result<()> {
        let Some(instance) = self.instance.take() else { return Ok(()) };
        let may_remove = self.installer.relation() != Relation::ChildOfLiving;
        let Ok(mut instance) = instance.into_inner() else {
            self.close_sockets();
            return Ok(());
        };
        match may_remove && (even_if_persistent || !instance.persists()) {
            true if instance.has_its_sockets() => {
                instance.take_channels();
                instance.remove()
            }
            true => Err(closed(instance.name())),
            false => Ok(()),
        }
    }
}

fn closed(name: &str) -> Error {
    Error::with(
        libc::EBADF,
        format_args!(
            "the program has closed the descriptors of the rules {name:?} (closefrom, close_range, daemon helpers), and with \
             them the kernel has removed the table: install the rules after that; tp_purge_rules removes what is left of \
             their routing, and chains of iptables"
        ),
    )
}

impl Drop for Rules {
    fn drop(&mut self) {
        let _ = self.end(false);
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("installer", &self.installer.pid).finish_non_exhaustive()
    }
}
