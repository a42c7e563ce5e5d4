//! Claims and sweeps on kernels that hold whatever others have put there: they come to an end, and touch nothing of
//! anyone else.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::backend::route::{PRIORITY_MAX, is_system_table};
use crate::model::{Backend, Mark, Mode, Protocols};
use crate::netlink::Transport;
use crate::netlink::uapi::*;
use crate::netlink::wire::{self, Buffer};
use crate::sys;

const NEW_TABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE;
const GET_TABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE;
const DELETE_TABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE;
const GET_GENERATION: u16 = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN;

/// A routing rule as a kernel has it.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    v6: bool,
    priority: u32,
    protocol: u8,
    /// FR_ACT_*.
    action: u8,
    /// The table, or the rule to go on with.
    target: u32,
    mark: u32,
    mask: u32,
    input: Option<&'static str>,
    /// A selector that no rule of ours has: its attribute.
    selector: Option<u16>,
    /// FIB_RULE_INVERT.
    inverted: bool,
}

impl Rule {
    /// It is one that this library could have made; said here once more, in other words.
    fn is_ours(&self) -> bool {
        let plain = self.protocol == 116 && self.selector.is_none() && !self.inverted;
        plain
            && match self.action {
                FR_ACT_TO_TBL => self.mask != 0 && self.input.is_none() && ![0, 253, 254, 255].contains(&self.target),
                FR_ACT_GOTO => {
                    self.mask != 0 && self.input == Some("lo") && u64::from(self.priority) + 3 == u64::from(self.target)
                }
                FR_ACT_NOP => self.mask == 0 && self.input.is_none(),
                _ => false,
            }
    }

    fn payload(&self) -> (Vec<u8>, impl Fn(&mut wire::Attrs<'_>)) {
        let flags: u32 = if self.inverted { FIB_RULE_INVERT } else { 0 };
        let family = if self.v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
        let mut header = vec![family, 0, 0, 0, 0, 0, 0, self.action];
        header.extend(flags.to_ne_bytes());
        let rule = self.clone();
        let attrs = move |a: &mut wire::Attrs<'_>| {
            a.u32(FRA_TABLE, if rule.action == FR_ACT_TO_TBL { rule.target } else { 0 });
            a.u32(FRA_SUPPRESS_PREFIXLEN, u32::MAX);
            a.u8(FRA_PROTOCOL, rule.protocol);
            if rule.action == FR_ACT_GOTO {
                a.u32(FRA_GOTO, rule.target);
            }
            if let Some(name) = rule.input {
                a.string(FRA_IIFNAME, name);
            }
            if rule.priority != 0 {
                a.u32(FRA_PRIORITY, rule.priority);
            }
            if rule.mask != 0 {
                a.u32(FRA_FWMARK, rule.mark);
                a.u32(FRA_FWMASK, rule.mask);
            }
            if let Some(kind) = rule.selector {
                a.u32(kind, 7);
            }
        };
        (header, attrs)
    }
}

/// A table of the inet family.
#[derive(Debug, Clone)]
struct NftTable {
    name: String,
    comment: String,
    flags: u32,
    owner: Option<u32>,
}

/// As much of a kernel as is asked here.
#[derive(Debug, Default)]
struct Kernel {
    generation: u32,
    tables: Vec<NftTable>,
    rules: Vec<Rule>,
    deleted_rules: Vec<Rule>,
    deleted_routes: Vec<u32>,
    /// A program that puts back what is deleted.
    stubborn: bool,
    requests: usize,
}

/// More questions than this and it would never end.
const REQUESTS_MAX: usize = 50_000;

impl Kernel {
    fn answer(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.requests += 1;
        assert!(self.requests < REQUESTS_MAX, "it never ends");
        let mut answers = Vec::new();
        let messages: Vec<_> = wire::messages(bytes).collect();
        let is_batch = messages.first().is_some_and(|message| message.kind == NFNL_MSG_BATCH_BEGIN);
        for message in messages {
            let attrs = message
                .payload
                .get(if message.kind >> 8 == NFNL_SUBSYS_NFTABLES || is_batch { 4.. } else { 12.. })
                .unwrap();
            let answer = match message.kind {
                NFNL_MSG_BATCH_BEGIN => match wire::be32_of(attrs, NFNL_BATCH_GENID) {
                    Some(generation) if generation != self.generation => {
                        return vec![error(message.seq, libc::ERESTART)];
                    }
                    _ => continue,
                },
                NFNL_MSG_BATCH_END => continue,
                GET_GENERATION => {
                    let generation = self.generation;
                    answers.push(one(message.kind, message.seq, &[0; 4], |a| a.be32(NFTA_GEN_ID, generation)));
                    continue;
                }
                GET_TABLE => {
                    for table in &self.tables {
                        answers.push(one(message.kind, message.seq, &[NFPROTO_INET, 0, 0, 0], |a| {
                            a.string(NFTA_TABLE_NAME, &table.name);
                            a.be32(NFTA_TABLE_FLAGS, table.flags);
                            let mut data = vec![0, table.comment.len() as u8 + 1];
                            data.extend(table.comment.as_bytes());
                            data.push(0);
                            a.bytes(NFTA_TABLE_USERDATA, &data);
                            if let Some(owner) = table.owner {
                                a.be32(NFTA_TABLE_OWNER, owner);
                            }
                        }));
                    }
                    answers.push(one(NLMSG_DONE, message.seq, &[0; 4], |_| {}));
                    continue;
                }
                NEW_TABLE => self.add_table(attrs),
                DELETE_TABLE => {
                    let name = wire::string_of(attrs, NFTA_TABLE_NAME).unwrap();
                    let before = self.tables.len();
                    self.tables.retain(|table| table.name != name);
                    self.generation += 1;
                    if self.tables.len() < before { 0 } else { libc::ENOENT }
                }
                libc::RTM_GETRULE => {
                    let family = message.payload[0];
                    let of_family = |rule: &&Rule| family == 0 || rule.v6 == (i32::from(family) == libc::AF_INET6);
                    for rule in self.rules.iter().filter(of_family) {
                        let (header, attrs) = rule.payload();
                        answers.push(one(libc::RTM_NEWRULE, message.seq, &header, attrs));
                    }
                    answers.push(one(NLMSG_DONE, message.seq, &[0; 4], |_| {}));
                    continue;
                }
                libc::RTM_DELRULE => self.delete_rule(message.payload, attrs),
                libc::RTM_DELROUTE => {
                    self.deleted_routes.push(wire::u32_of(attrs, RTA_TABLE).unwrap());
                    libc::ESRCH
                }
                kind => panic!("message {kind}"),
            };
            if answer != 0 || message.flags & libc::NLM_F_ACK as u16 != 0 {
                answers.push(error(message.seq, answer));
            }
        }
        answers
    }

    fn add_table(&mut self, attrs: &[u8]) -> i32 {
        let name = wire::string_of(attrs, NFTA_TABLE_NAME).unwrap().to_owned();
        self.generation += 1;
        if let Some(table) = self.tables.iter_mut().find(|table| table.name == name) {
            table.owner = Some(1 << 10);
            return 0;
        }
        let comment = wire::string(&wire::attribute(attrs, NFTA_TABLE_USERDATA).unwrap()[2..]).unwrap().to_owned();
        self.tables.push(NftTable { name, comment, flags: NFT_TABLE_F_OWNER, owner: Some(1 << 10) });
        0
    }

    /// What is given has to be the same; what is not given may be anything (`rule_find`).
    fn delete_rule(&mut self, header: &[u8], attrs: &[u8]) -> i32 {
        let number = |kind| wire::u32_of(attrs, kind);
        let at = self.rules.iter().position(|rule| {
            let family = if rule.v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
            let target = if header[7] == FR_ACT_GOTO { number(FRA_GOTO) } else { number(FRA_TABLE) };
            header[0] == family
                && header[7] == rule.action
                && number(FRA_PRIORITY).is_none_or(|priority| priority == rule.priority)
                && wire::u8_of(attrs, FRA_PROTOCOL).is_none_or(|protocol| protocol == rule.protocol)
                && target.is_none_or(|target| target == 0 || target == rule.target)
                && number(FRA_FWMARK).is_none_or(|mark| mark == rule.mark || rule.mask == 0)
                && wire::string_of(attrs, FRA_IIFNAME).is_none_or(|name| rule.input == Some(name))
        });
        let Some(at) = at else { return libc::ENOENT };
        let rule = if self.stubborn { self.rules[at].clone() } else { self.rules.remove(at) };
        if self.stubborn {
            // It comes back as another.
            self.rules[at].priority = rule.priority % 30_000 + 1;
            self.rules[at].target = if rule.action == 2 { rule.priority % 30_000 + 4 } else { rule.target };
        }
        self.deleted_rules.push(rule);
        0
    }
}

fn one(kind: u16, seq: u32, header: &[u8], attrs: impl FnOnce(&mut wire::Attrs<'_>)) -> Vec<u8> {
    let mut buffer = Buffer::default();
    buffer.message(kind, 0, seq, header, attrs);
    buffer.bytes().unwrap().to_vec()
}

fn error(seq: u32, errno: i32) -> Vec<u8> {
    let mut header = (-errno).to_ne_bytes().to_vec();
    header.extend([0; 16]);
    one(NLMSG_ERROR, seq, &header, |_| {})
}

struct Connection(Arc<Mutex<Kernel>>, VecDeque<Vec<u8>>);

impl Transport for Connection {
    fn send(&mut self, bytes: &[u8]) -> sys::Result<()> {
        self.1.extend(self.0.lock().unwrap().answer(bytes));
        Ok(())
    }

    fn receive(&mut self, buffer: &mut Vec<u8>) -> sys::Result<()> {
        *buffer = self.1.pop_front().ok_or(sys::Errno(libc::EAGAIN))?;
        Ok(())
    }
}

/// Two channels to one kernel.
fn connected(kernel: Kernel) -> (Arc<Mutex<Kernel>>, Channel, Channel) {
    let kernel = Arc::new(Mutex::new(kernel));
    let channel = || Channel::over(Box::new(Connection(kernel.clone(), VecDeque::new())));
    let (nft, route) = (channel(), channel());
    (kernel, nft, route)
}

/// Numbers at which something could turn over, and those that are in use.
fn priority() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        (u32::MAX - 5)..=u32::MAX,
        190..240u32,
        0..5u32,
        (PRIORITY_MAX - 4)..32_770,
        (i32::MAX as u32 - 4)..(i32::MAX as u32 + 5),
    ]
}

fn table() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 250..258u32, 7468..7480u32, Just(0), Just(u32::MAX), 98..102u32]
}

/// Rules of which many are nearly ours.
fn rule() -> impl Strategy<Value = Rule> {
    // FRA_FLOW and FRA_TUN_ID are 11 and 12.
    let selectors = vec![FRA_DST, FRA_SRC, 11, 12, FRA_OIFNAME, FRA_UID_RANGE, FRA_IP_PROTO, FRA_DPORT_RANGE];
    let selectors = prop_oneof![6 => Just(None), 1 => proptest::sample::select(selectors).prop_map(Some)];
    let input = prop_oneof![4 => Just(None), 1 => Just(Some("eth0")), 2 => Just(Some("lo"))];
    let actions = vec![FR_ACT_TO_TBL, FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP, FR_ACT_BLACKHOLE];
    let actions = proptest::sample::select(actions);
    let protocol = prop_oneof![4 => Just(116u8), 1 => any::<u8>()];
    let mark = prop_oneof![Just((0x2000u32, 0x3000u32)), Just((0, 0)), any::<(u32, u32)>()];
    let flags = (any::<bool>(), proptest::bool::weighted(0.1), proptest::bool::weighted(0.7));
    (priority(), table(), actions, protocol, mark, input, selectors, flags).prop_map(
        |(priority, table, action, protocol, (mark, mask), input, selector, (v6, inverted, sensible))| {
            let mut rule =
                Rule { v6, priority, protocol, action, target: table, mark, mask, input, selector, inverted };
            if sensible {
                // Such as this library makes them, as far as the numbers let it.
                rule.input = (action == 2).then_some("lo");
                (rule.mark, rule.mask) = if action == 3 { (0, 0) } else { (0x2000, 0x3000) };
                rule.target = if action == 2 { priority.wrapping_add(3) } else { table };
            }
            rule
        },
    )
}

/// Tables of this library's and of others, living and dead, with comments that anybody may have written.
fn nft_table() -> impl Strategy<Value = NftTable> {
    let name = proptest::sample::select(vec![
        "libtproxy-a",
        "libtproxy-tproxy",
        "libtproxy-b",
        SWEEPER,
        "filter",
        "libtproxy-",
    ]);
    let comment = prop_oneof![
        4 => (priority(), table()).prop_map(|(priority, table)| format!("libtproxy: priority {priority} table {table}")),
        1 => "libtproxy: priority [0-9+-]{0,12} table [0-9]{0,12}",
        1 => Just(String::new()),
    ];
    let flags = proptest::sample::select(vec![0u32, 2, 4, 6]);
    let owner = prop_oneof![Just(None), (1..4_000_000u32).prop_map(|pid| Some(pid << 10 | 3))];
    (name, comment, flags, owner).prop_map(|(name, comment, flags, owner)| NftTable {
        name: name.to_owned(),
        comment,
        flags,
        owner,
    })
}

fn kernel() -> impl Strategy<Value = Kernel> {
    let tables = proptest::collection::vec(nft_table(), 0..4);
    (tables, proptest::collection::vec(rule(), 0..12)).prop_map(|(mut tables, rules)| {
        tables.sort_by(|a, b| a.name.cmp(&b.name));
        tables.dedup_by(|a, b| a.name == b.name);
        // The kernel deletes the first rule that has what is given, whatever else it has (`rule_find`): of two that
        // differ in nothing else it cannot be told which one is meant.
        let mut rules = rules;
        let given = |rule: &Rule| {
            (rule.v6, rule.priority, rule.protocol, rule.action, if rule.action == 3 { 0 } else { rule.target })
        };
        let ours: Vec<_> = rules.iter().filter(|rule| rule.is_ours()).map(given).collect();
        rules.retain(|rule| rule.is_ours() || !ours.contains(&given(rule)));
        Kernel { tables, rules, generation: 1, ..Kernel::default() }
    })
}

fn plan(persist: bool, table: Option<u32>, priority: Option<u32>) -> Plan {
    Plan {
        name: "tproxy".to_owned(),
        mode: Mode::Tproxy,
        mark: Mark::DEFAULT,
        loop_mark: None,
        local_output: false,
        local_servers: false,
        new_only: false,
        families: Families::ALL,
        families_are_default: true,
        protocols: Protocols { tcp: true, udp: false },
        intercepts: Vec::new(),
        guard: true,
        fail_open: false,
        notrack: false,
        persist,
        ports: crate::plan::ByProtocol::default(),
        reject: crate::plan::ByProtocol::default(),
        bypass_src: None,
        bypass_interfaces: crate::plan::Interfaces::default(),
        macs: None,
        bypass_macs: Vec::new(),
        owners: crate::plan::Owners::default(),
        dst: None,
        src: None,
        bypass: None,
        interfaces: None,
        table,
        priority,
        learned: Default::default(),
    }
}

/// The slots that tables speak for, as numbers that cannot turn over.
fn spoken_for(tables: &[NftTable]) -> Vec<(u64, u32)> {
    let read = |table: &NftTable| {
        let words: Vec<&str> = table.comment.strip_prefix("libtproxy: priority ")?.split(" table ").collect();
        let (priority, routes) = (words.first()?.parse::<u64>().ok()?, words.get(1)?.parse::<u32>().ok()?);
        let possible = (1..=32_762).contains(&priority) && ![0, 253, 254, 255].contains(&routes) && words.len() == 2;
        (possible && table.name != SWEEPER).then_some((priority, routes))
    };
    tables.iter().filter_map(read).collect()
}

fn is_in(rule: &Rule, slots: &[(u64, u32)]) -> bool {
    slots.iter().any(|(priority, _)| (*priority..priority + 4).contains(&u64::from(rule.priority)))
}

proptest! {
    #[test]
    fn sweep_removes_only_what_dead_instances_left(kernel in kernel()) {
        let before = (kernel.rules.clone(), spoken_for(&kernel.tables), kernel.tables.clone());
        let (kernel, mut nft, mut route) = connected(kernel);
        let outcome = remove_all_stale(&mut nft, &mut route);
        let kernel = kernel.lock().unwrap();
        let (rules, slots, tables) = before;
        prop_assert!(kernel.deleted_rules.iter().all(Rule::is_ours), "{:?}", kernel.deleted_rules);
        prop_assert!(!kernel.deleted_rules.iter().any(|rule| is_in(rule, &slots)));
        let mine = |table: &u32| is_system_table(*table) || slots.iter().any(|(_, routes)| routes == table);
        prop_assert!(!kernel.deleted_routes.iter().any(mine), "{:?}", kernel.deleted_routes);
        let sweeper = tables.iter().any(|table| table.name == SWEEPER && table.owner.is_some());
        if sweeper {
            prop_assert_eq!(outcome.unwrap_err().errno(), libc::EAGAIN);
        } else {
            prop_assert!(outcome.is_ok(), "{:?}", outcome);
            prop_assert!(!kernel.rules.iter().any(|rule| rule.is_ours() && !is_in(rule, &slots)), "{:?}", kernel.rules);
            prop_assert!(!kernel.tables.iter().any(|table| table.name == SWEEPER));
        }
        let others = |rules: &[Rule]| rules.iter().filter(|rule| !rule.is_ours()).cloned().collect::<Vec<_>>();
        prop_assert_eq!(others(&kernel.rules), others(&rules));
    }

    #[test]
    fn claim_ends_and_takes_a_free_slot(
        kernel in kernel(),
        persist: bool,
        wanted in proptest::option::of(table().prop_filter("as tp_install_rules takes it", |table| !is_system_table(*table))),
        priority in proptest::option::of(1..=PRIORITY_MAX),
    ) {
        let slots = spoken_for(&kernel.tables);
        let rules = kernel.rules.clone();
        let (kernel, mut nft, mut route) = connected(kernel);
        let claimed = claim(&plan(persist, wanted, priority), &plan(persist, None, None).record(Backend::Nft), &mut nft, &mut route, &[]);
        let kernel = kernel.lock().unwrap();
        prop_assert!(kernel.deleted_rules.iter().all(Rule::is_ours), "{:?}", kernel.deleted_rules);
        let mine = |table: &u32| is_system_table(*table) || slots.iter().any(|(_, routes)| routes == table);
        prop_assert!(!kernel.deleted_routes.iter().any(mine), "{:?}", kernel.deleted_routes);
        let others = |rules: &[Rule]| rules.iter().filter(|rule| !rule.is_ours()).cloned().collect::<Vec<_>>();
        prop_assert_eq!(others(&kernel.rules), others(&rules));
        let Ok(Claim { slot, adopted, .. }) = claimed else { return Ok(()) };
        prop_assert!((1..=PRIORITY_MAX).contains(&slot.priority) && !is_system_table(slot.table), "{}", slot);
        let own = [(u64::from(slot.priority), slot.table)];
        if adopted {
            prop_assert!(slots.contains(&own[0]));
        } else {
            let near = |(priority, table): &(u64, u32)| priority.abs_diff(own[0].0) < 4 || *table == slot.table;
            prop_assert!(!slots.iter().any(near), "{} in {:?}", slot, slots);
            // Rules of others, and none of ours that would be taken for those of the new instance.
            prop_assert!(!kernel.rules.iter().any(|rule| is_in(rule, &own)), "{:?}", kernel.rules);
        }
    }
}

/// A program that puts routing rules back which look like ours keeps nobody busy for ever.
#[test]
fn sweep_of_rules_that_come_back_ends() {
    let rule = Rule {
        v6: false,
        priority: 300,
        protocol: 116,
        action: FR_ACT_TO_TBL,
        target: 100,
        mark: 1,
        mask: 1,
        input: None,
        selector: None,
        inverted: false,
    };
    let (_, mut nft, mut route) = connected(Kernel { rules: vec![rule], stubborn: true, ..Kernel::default() });
    let error = remove_all_stale(&mut nft, &mut route).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN, "{error}");
    assert!(error.to_string().contains("protocol 116"), "{error}");
}

/// What a dead instance left in a slot may lead to the routing table of a living one, whose routes stay.
#[test]
fn claim_of_stale_slot_keeps_tables_of_the_living() {
    let table = |name: &str, comment: &str| NftTable {
        name: name.to_owned(),
        comment: comment.to_owned(),
        flags: 2,
        owner: Some(77 << 10),
    };
    let left = Rule {
        v6: false,
        priority: 201,
        protocol: 116,
        action: FR_ACT_TO_TBL,
        target: 7471,
        mark: 0x2000,
        mask: 0x3000,
        input: None,
        selector: None,
        inverted: false,
    };
    // Another process sweeps elsewhere, so that the slot is not swept before it is claimed.
    let tables = vec![
        table("libtproxy-a", "libtproxy: priority 300 table 7471"),
        table(SWEEPER, "libtproxy: priority 500 table 9"),
    ];
    let (kernel, mut nft, mut route) = connected(Kernel { rules: vec![left], tables, ..Kernel::default() });
    let claimed =
        claim(&plan(false, None, None), &plan(false, None, None).record(Backend::Nft), &mut nft, &mut route, &[])
            .unwrap();
    assert_eq!(claimed.slot, RoutingSlot { priority: 200, table: 7470 });
    let kernel = kernel.lock().unwrap();
    assert_eq!((kernel.rules.len(), &kernel.deleted_routes), (0, &Vec::new()));
}
