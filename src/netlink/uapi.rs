//! Numbers of the kernel's interface, under the kernel's own names, by the header that defines them.
//!
//! A constant without a value has the value that `libc` gives it; the type is the one that its attribute or message has.
//! The test compares all of them with the headers that are installed.

/// Declares the constants of each header. `since` is the version of Linux whose header has a constant, if it is newer than
/// `tests::OLDEST`.
macro_rules! constants {
    ($($header:literal { $($(#[$doc:meta])* $name:ident: $type:ty $(= $value:expr)? $(, since $since:expr)?;)* })*) => {
        $($($(#[$doc])* pub(crate) const $name: $type = value!($name, $type $(, $value)?);)*)*

        /// Header, name, type, value, and the version of Linux since which the header has it.
        #[cfg(test)]
        const ALL: &[(&str, &str, &str, i64, Option<(u32, u32)>)] = &[
            $($(($header, stringify!($name), stringify!($type), $name as i64, since!($($since)?)),)*)*
        ];
    };
}

macro_rules! value {
    ($name:ident, $type:ty) => {
        libc::$name as $type
    };
    ($name:ident, $type:ty, $value:expr) => {
        $value
    };
}

#[cfg(test)]
macro_rules! since {
    () => {
        None
    };
    ($since:expr) => {
        Some($since)
    };
}

constants! {
    "linux/netlink.h" {
        /// An acknowledgement (error 0) or an error.
        NLMSG_ERROR: u16;
        /// The end of a dump.
        NLMSG_DONE: u16;
        /// The first message type that belongs to a family and not to netlink itself.
        NLMSG_MIN_TYPE: u16;
        /// The objects changed during the dump.
        NLM_F_DUMP_INTR: u16;
        /// An extended acknowledgement follows.
        NLM_F_ACK_TLVS: u16;
        NLMSGERR_ATTR_MSG: u16 = 1;
        NLMSGERR_ATTR_OFFS: u16 = 2;
        NLA_F_NESTED: u16;
        /// The type of an attribute without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
        NLA_TYPE_MASK: u16;
        NETLINK_ADD_MEMBERSHIP: i32;
        /// Errors do not repeat the request.
        NETLINK_CAP_ACK: i32;
        /// Errors have a text and the offset of the attribute that is wrong.
        NETLINK_EXT_ACK: i32;
        /// A dump with a filter is filtered.
        NETLINK_GET_STRICT_CHK: i32;
    }

    "linux/netfilter.h" {
        NFPROTO_UNSPEC: u8;
        /// Tables that see IPv4 and IPv6.
        NFPROTO_INET: u8;
        NFPROTO_IPV4: u8;
        NFPROTO_IPV6: u8;
        NF_INET_PRE_ROUTING: u32;
        NF_INET_LOCAL_IN: u32;
        NF_INET_FORWARD: u32;
        NF_INET_LOCAL_OUT: u32;
        NF_INET_POST_ROUTING: u32;
        NF_DROP: u32;
        NF_ACCEPT: u32;
    }

    "linux/netfilter_ipv4.h" {
        NF_IP_PRI_RAW: i32;
        NF_IP_PRI_MANGLE: i32;
        NF_IP_PRI_NAT_DST: i32;
        NF_IP_PRI_SECURITY: i32;
        NF_IP_PRI_NAT_SRC: i32;
    }

    "linux/netfilter/nfnetlink.h" {
        NFNL_SUBSYS_NFTABLES: u16;
        NFNL_MSG_BATCH_BEGIN: u16;
        NFNL_MSG_BATCH_END: u16;
        /// Commits the batch only if the ruleset still has this generation.
        NFNL_BATCH_GENID: u16;
        NFNLGRP_NFTRACE: i32;
    }

    "linux/netfilter/nf_tables.h" {
        NFT_MSG_NEWTABLE: u16;
        NFT_MSG_GETTABLE: u16;
        NFT_MSG_DELTABLE: u16;
        NFT_MSG_NEWCHAIN: u16;
        NFT_MSG_GETCHAIN: u16;
        NFT_MSG_DELCHAIN: u16;
        NFT_MSG_NEWRULE: u16;
        NFT_MSG_GETRULE: u16;
        NFT_MSG_DELRULE: u16;
        NFT_MSG_NEWSET: u16;
        NFT_MSG_GETSET: u16;
        NFT_MSG_DELSET: u16;
        NFT_MSG_NEWSETELEM: u16;
        NFT_MSG_GETSETELEM: u16;
        NFT_MSG_DELSETELEM: u16;
        NFT_MSG_GETGEN: u16;
        NFT_MSG_TRACE: u16;
        NFT_MSG_NEWOBJ: u16;
        NFT_MSG_GETOBJ: u16;

        NFTA_LIST_ELEM: u16 = 1;
        NFTA_GEN_ID: u16 = 1;

        NFTA_TABLE_NAME: u16 = 1;
        NFTA_TABLE_FLAGS: u16 = 2;
        NFTA_TABLE_USERDATA: u16 = 6;
        NFTA_TABLE_OWNER: u16 = 7;
        /// The table belongs to the socket that created it, and is deleted with it.
        NFT_TABLE_F_OWNER: u32 = 2;
        /// The table survives its owner as an orphan, which another socket may adopt.
        NFT_TABLE_F_PERSIST: u32 = 4, since (6, 9);

        NFTA_CHAIN_TABLE: u16 = 1;
        NFTA_CHAIN_NAME: u16 = 3;
        NFTA_CHAIN_HOOK: u16 = 4;
        NFTA_CHAIN_POLICY: u16 = 5;
        NFTA_CHAIN_TYPE: u16 = 7;
        NFTA_HOOK_HOOKNUM: u16 = 1;
        NFTA_HOOK_PRIORITY: u16 = 2;

        NFTA_RULE_TABLE: u16 = 1;
        NFTA_RULE_CHAIN: u16 = 2;
        NFTA_RULE_HANDLE: u16 = 3;
        NFTA_RULE_EXPRESSIONS: u16 = 4;
        NFTA_RULE_USERDATA: u16 = 7;

        NFTA_SET_TABLE: u16 = 1;
        NFTA_SET_NAME: u16 = 2;
        NFTA_SET_FLAGS: u16 = 3;
        NFTA_SET_KEY_TYPE: u16 = 4;
        NFTA_SET_KEY_LEN: u16 = 5;
        NFTA_SET_ID: u16 = 10;
        NFTA_SET_USERDATA: u16 = 13;
        NFTA_SET_DESC: u16 = 9;
        NFTA_SET_DESC_SIZE: u16 = 1;
        NFTA_SET_GC_INTERVAL: u16 = 12;
        NFT_SET_INTERVAL: u32;
        NFT_SET_TIMEOUT: u32;

        NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
        NFTA_SET_ELEM_LIST_SET: u16 = 2;
        NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
        NFTA_SET_ELEM_KEY: u16 = 1;
        NFTA_SET_ELEM_FLAGS: u16 = 3;
        NFTA_SET_ELEM_TIMEOUT: u16 = 4;
        NFTA_SET_ELEM_EXPIRATION: u16 = 5;
        NFT_SET_ELEM_INTERVAL_END: u32;
        NFT_SET_ELEM_CATCHALL: u32 = 2;

        NFTA_OBJ_TABLE: u16 = 1;
        NFTA_OBJ_NAME: u16 = 2;
        NFTA_OBJ_TYPE: u16 = 3;
        NFTA_OBJ_DATA: u16 = 4;
        NFT_OBJECT_COUNTER: u32 = 1;
        NFTA_COUNTER_BYTES: u16 = 1;
        NFTA_COUNTER_PACKETS: u16 = 2;

        NFTA_DATA_VALUE: u16 = 1;
        NFTA_DATA_VERDICT: u16 = 2;
        NFTA_VERDICT_CODE: u16 = 1;
        NFTA_VERDICT_CHAIN: u16 = 2;
        NFT_JUMP: u32;
        NFT_GOTO: u32;
        NFT_RETURN: u32;

        NFT_REG_VERDICT: u32;
        NFT_REG_1: u32;
        NFT_REG_2: u32;
        NFT_REG_4: u32;
        NFT_REG32_00: u32;

        NFTA_EXPR_NAME: u16 = 1;
        NFTA_EXPR_DATA: u16 = 2;

        NFTA_BITWISE_SREG: u16 = 1;
        NFTA_BITWISE_DREG: u16 = 2;
        NFTA_BITWISE_LEN: u16 = 3;
        NFTA_BITWISE_MASK: u16 = 4;
        NFTA_BITWISE_XOR: u16 = 5;
        NFTA_BITWISE_OP: u16 = 6;
        NFT_BITWISE_BOOL: u32 = 0;

        NFTA_BYTEORDER_SREG: u16 = 1;
        NFTA_BYTEORDER_DREG: u16 = 2;
        NFTA_BYTEORDER_OP: u16 = 3;
        NFTA_BYTEORDER_LEN: u16 = 4;
        NFTA_BYTEORDER_SIZE: u16 = 5;
        NFT_BYTEORDER_HTON: u32;

        NFTA_CMP_SREG: u16 = 1;
        NFTA_CMP_OP: u16 = 2;
        NFTA_CMP_DATA: u16 = 3;
        NFT_CMP_EQ: u32;
        NFT_CMP_NEQ: u32;
        NFT_CMP_LTE: u32;
        NFT_CMP_GTE: u32;

        NFTA_CT_DREG: u16 = 1;
        NFTA_CT_KEY: u16 = 2;
        NFTA_CT_SREG: u16 = 4;
        NFT_CT_STATE: u32;
        NFT_CT_DIRECTION: u32;
        NFT_CT_STATUS: u32;
        NFT_CT_MARK: u32;

        NFTA_FIB_DREG: u16 = 1;
        NFTA_FIB_RESULT: u16 = 2;
        NFTA_FIB_FLAGS: u16 = 3;
        NFT_FIB_RESULT_OIF: u32 = 1;
        NFT_FIB_RESULT_OIFNAME: u32 = 2;
        NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
        NFTA_FIB_F_SADDR: u32 = 1;
        NFTA_FIB_F_DADDR: u32 = 2;
        NFTA_FIB_F_MARK: u32 = 4;

        NFTA_IMMEDIATE_DREG: u16 = 1;
        NFTA_IMMEDIATE_DATA: u16 = 2;

        NFTA_LOOKUP_SET: u16 = 1;
        NFTA_LOOKUP_SREG: u16 = 2;
        NFTA_LOOKUP_DREG: u16 = 3;
        NFTA_LOOKUP_FLAGS: u16 = 5;
        NFT_LOOKUP_F_INV: u32;

        NFTA_META_DREG: u16 = 1;
        NFTA_META_KEY: u16 = 2;
        NFTA_META_SREG: u16 = 3;
        NFT_META_PRIORITY: u32;
        NFT_META_MARK: u32;
        NFT_META_IIF: u32;
        NFT_META_IIFNAME: u32;
        NFT_META_IIFTYPE: u32;
        NFT_META_SKUID: u32;
        NFT_META_SKGID: u32;
        NFT_META_NFTRACE: u32;
        NFT_META_NFPROTO: u32;
        NFT_META_L4PROTO: u32;

        NFTA_NAT_TYPE: u16 = 1;
        NFTA_NAT_FAMILY: u16 = 2;
        NFTA_NAT_REG_ADDR_MIN: u16 = 3;
        NFTA_NAT_REG_PROTO_MIN: u16 = 5;
        NFTA_NAT_FLAGS: u16 = 7;
        NFT_NAT_DNAT: u32;

        NFTA_OBJREF_IMM_TYPE: u16 = 1;
        NFTA_OBJREF_IMM_NAME: u16 = 2;

        NFTA_PAYLOAD_DREG: u16 = 1;
        NFTA_PAYLOAD_BASE: u16 = 2;
        NFTA_PAYLOAD_OFFSET: u16 = 3;
        NFTA_PAYLOAD_LEN: u16 = 4;
        NFT_PAYLOAD_LL_HEADER: u32;
        NFT_PAYLOAD_NETWORK_HEADER: u32;
        NFT_PAYLOAD_TRANSPORT_HEADER: u32;

        NFTA_RANGE_SREG: u16 = 1;
        NFTA_RANGE_OP: u16 = 2;
        NFTA_RANGE_FROM_DATA: u16 = 3;
        NFTA_RANGE_TO_DATA: u16 = 4;
        NFT_RANGE_NEQ: u32;

        NFTA_REDIR_REG_PROTO_MIN: u16 = 1;
        NFTA_REDIR_FLAGS: u16 = 3;

        NFTA_REJECT_TYPE: u16 = 1;
        NFTA_REJECT_ICMP_CODE: u16 = 2;
        NFT_REJECT_TCP_RST: u32;
        NFT_REJECT_ICMPX_UNREACH: u32;
        NFT_REJECT_ICMPX_PORT_UNREACH: u8;

        NFTA_SOCKET_KEY: u16 = 1;
        NFTA_SOCKET_DREG: u16 = 2;
        NFTA_SOCKET_LEVEL: u16 = 3;
        NFT_SOCKET_TRANSPARENT: u32 = 0;
        NFT_SOCKET_WILDCARD: u32 = 2;
        NFT_SOCKET_CGROUPV2: u32 = 3;

        NFTA_TPROXY_FAMILY: u16 = 1;
        NFTA_TPROXY_REG_ADDR: u16 = 2;
        NFTA_TPROXY_REG_PORT: u16 = 3;

        NFTA_TRACE_TABLE: u16 = 1;
        NFTA_TRACE_CHAIN: u16 = 2;
        NFTA_TRACE_RULE_HANDLE: u16 = 3;
        NFTA_TRACE_TYPE: u16 = 4;
        NFTA_TRACE_VERDICT: u16 = 5;
        NFTA_TRACE_ID: u16 = 6;
        NFTA_TRACE_NETWORK_HEADER: u16 = 8;
        NFTA_TRACE_NFPROTO: u16 = 15;
        NFTA_TRACE_POLICY: u16 = 16;
        NFT_TRACETYPE_RULE: u32;
    }

    "linux/netfilter/nf_tables_compat.h" {
        NFTA_TARGET_NAME: u16 = 1;
        NFTA_TARGET_REV: u16 = 2;
        NFTA_TARGET_INFO: u16 = 3;
        NFTA_MATCH_NAME: u16 = 1;
        NFTA_MATCH_REV: u16 = 2;
        NFTA_MATCH_INFO: u16 = 3;
    }

    "linux/netfilter/nf_nat.h" {
        NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 1 << 1;
    }

    "linux/netfilter/nf_conntrack_tuple_common.h" {
        IP_CT_DIR_ORIGINAL: u8 = 0;
        IP_CT_DIR_REPLY: u8 = 1;
    }

    "linux/netfilter/nf_conntrack_common.h" {
        IP_CT_ESTABLISHED: u32 = 0;
        IP_CT_NEW: u32 = 2;
        /// Half of the number of connection states; those of replies follow.
        IP_CT_IS_REPLY: u32 = 3;
        IPS_ASSURED: u32 = 1 << 2;
        IPS_DST_NAT: u32 = 1 << 5;
    }

    "linux/netfilter/x_tables.h" {
        XT_RETURN: i32 = -5;
        XT_INV_PROTO: u8 = 0x40;
    }

    "linux/netfilter/xt_addrtype.h" {
        XT_ADDRTYPE_INVERT_DEST: u32 = 2;
        XT_ADDRTYPE_LOCAL: u16 = 1 << 2;
    }

    "linux/netfilter/xt_connmark.h" {
        XT_CONNMARK_RESTORE: u8 = 2;
    }

    "linux/netfilter/xt_rpfilter.h" {
        XT_RPFILTER_VALID_MARK: u8 = 1 << 1;
        XT_RPFILTER_INVERT: u8 = 1 << 3;
    }

    "linux/netfilter/xt_tcpudp.h" {
        /// XT_UDP_INV_DSTPT is the same.
        XT_TCP_INV_DSTPT: u8 = 2;
    }

    "linux/netfilter_ipv4/ip_tables.h" {
        /// The options are the same for IPv6.
        IPT_SO_GET_INFO: i32 = 64;
        IPT_SO_GET_ENTRIES: i32 = 65;
        IPT_F_GOTO: u8 = 2;
        /// The same for IPv6.
        IPT_INV_VIA_IN: u8 = 1;
    }

    "linux/netfilter_ipv6/ip6_tables.h" {
        IP6T_F_GOTO: u8 = 4;
    }

    "linux/fib_rules.h" {
        FIB_RULE_INVERT: u32 = 2;
        FR_ACT_TO_TBL: u8 = 1;
        FR_ACT_GOTO: u8 = 2;
        FR_ACT_NOP: u8 = 3;
        FR_ACT_BLACKHOLE: u8 = 6;
        FR_ACT_UNREACHABLE: u8 = 7;
        FRA_DST: u16 = 1;
        FRA_SRC: u16 = 2;
        FRA_IIFNAME: u16 = 3;
        FRA_GOTO: u16 = 4;
        FRA_PRIORITY: u16 = 6;
        FRA_FWMARK: u16 = 10;
        FRA_SUPPRESS_IFGROUP: u16 = 13;
        /// Every rule has it: -1, if it suppresses nothing.
        FRA_SUPPRESS_PREFIXLEN: u16 = 14;
        FRA_TABLE: u16 = 15;
        FRA_FWMASK: u16 = 16;
        FRA_OIFNAME: u16 = 17;
        FRA_PAD: u16 = 18;
        FRA_L3MDEV: u16 = 19;
        FRA_UID_RANGE: u16 = 20;
        FRA_PROTOCOL: u16 = 21;
        FRA_IP_PROTO: u16 = 22;
        FRA_SPORT_RANGE: u16 = 23;
        FRA_DPORT_RANGE: u16 = 24;
        /// The last that is known to be a selector.
        FRA_DSCP_MASK: u16 = 30, since (6, 15);
    }

    "linux/rtnetlink.h" {
        RTA_DST: u16;
        RTA_OIF: u16;
        RTA_GATEWAY: u16;
        /// The metric.
        RTA_PRIORITY: u16;
        RTA_TABLE: u16;
        RTPROT_STATIC: u8;
        /// The gateway is a neighbor, regardless of routes.
        RTNH_F_ONLINK: u32 = 4;
        RTEXT_FILTER_SKIP_STATS: u32;
    }

    "linux/ipv6_route.h" {
        /// The metric of a route of IPv6 that was given none. Without it, a request to delete such a route would take any.
        IP6_RT_PRIO_USER: u32 = 1024;
    }

    "linux/if_link.h" {
        IFLA_ADDRESS: u16;
        IFLA_IFNAME: u16;
        IFLA_MASTER: u16;
        IFLA_LINKINFO: u16;
        IFLA_AF_SPEC: u16;
        IFLA_NET_NS_FD: u16;
        IFLA_EXT_MASK: u16;
        IFLA_INFO_KIND: u16;
        IFLA_INFO_DATA: u16;
        IFLA_INET_CONF: u16 = 1;
        IFLA_INET6_CONF: u16 = 2;
    }

    "linux/veth.h" {
        VETH_INFO_PEER: u16 = 1;
    }

    "linux/ip.h" {
        IPV4_DEVCONF_FORWARDING: usize = 1;
        IPV4_DEVCONF_RP_FILTER: usize = 8;
        IPV4_DEVCONF_ACCEPT_LOCAL: usize = 23;
        IPV4_DEVCONF_SRC_VMARK: usize = 24;
        IPV4_DEVCONF_ROUTE_LOCALNET: usize = 26;
    }

    "linux/ipv6.h" {
        DEVCONF_ACCEPT_RA: usize = 3;
        DEVCONF_DISABLE_IPV6: usize = 26;
    }

    "linux/if_addr.h" {
        IFA_ADDRESS: u16;
        IFA_LOCAL: u16;
        IFA_FLAGS: u16;
        /// The address is usable immediately, without duplicate address detection.
        IFA_F_NODAD: u32;
    }

    "linux/neighbour.h" {
        NDA_DST: u16;
        NDA_LLADDR: u16;
        NUD_PERMANENT: u16;
    }

    "linux/sock_diag.h" {
        SOCK_DIAG_BY_FAMILY: u16 = 20;
    }

    "linux/inet_diag.h" {
        INET_DIAG_SKV6ONLY: u16 = 11;
        INET_DIAG_SOCKOPT: u16 = 22;
    }

    "netinet/tcp.h" {
        TCP_CLOSE: u32 = 7;
        TCP_LISTEN: u32 = 10;
    }
}

/// A state of connection tracking as the bit that `ct state` and the matches of iptables compare
/// (`linux/netfilter/nf_conntrack_common.h`; a function-like macro in C).
#[allow(non_snake_case)]
pub(crate) const fn NF_CT_STATE_BIT(state: u32) -> u32 {
    1 << (state % IP_CT_IS_REPLY + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// The headers of this version have all constants that do not say otherwise.
    const OLDEST: (u32, u32) = (5, 14);

    /// Compiles a program without linking it. `Err`: the compiler's messages; `None`: there is no compiler.
    fn compile(source: &str) -> Option<Result<(), String>> {
        let mut compiler = Command::new("cc")
            .args(["-x", "c", "-fsyntax-only", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        compiler.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
        let output = compiler.wait_with_output().unwrap();
        Some(if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) })
    }

    #[test]
    fn constants_equal_those_of_the_kernel_headers() {
        let (major, minor) = OLDEST;
        let version = format!(
            "#include <linux/version.h>\n_Static_assert(LINUX_VERSION_CODE >= KERNEL_VERSION({major}, {minor}, 0), \"\");\n"
        );
        if !matches!(compile(&version), Some(Ok(()))) {
            println!(
                "skipped: constants_equal_those_of_the_kernel_headers: no C compiler, or no kernel headers of \
                 Linux {major}.{minor} or newer; needs `cc -x c -fsyntax-only -include linux/netfilter/nf_tables.h /dev/null`"
            );
            return;
        }
        let mut headers: Vec<&str> = ALL.iter().map(|(header, ..)| *header).collect();
        headers.dedup();
        let mut wrong = String::new();
        for wanted in headers {
            // Some headers use constants of others without including these.
            let others = ["linux/version.h", "linux/netlink.h", "linux/netfilter.h"];
            let others = &others[..if wanted.starts_with("linux/netfilter") { 3 } else { 2 }];
            let includes = others.iter().chain([&wanted]).map(|header| format!("#include <{header}>\n"));
            let mut source: String = includes.collect();
            for (header, name, kind, value, since) in ALL {
                if *header != wanted {
                    continue;
                }
                let (c_type, value) = match *kind {
                    "u8" => ("unsigned char", *value),
                    "u16" => ("unsigned short", *value),
                    "i32" => ("int", *value),
                    _ => ("unsigned int", *value),
                };
                let check = format!("_Static_assert(({c_type})({name}) == {value}, \"{name} is not {value}\");\n");
                source += &match since {
                    Some((major, minor)) => {
                        format!("#if LINUX_VERSION_CODE >= KERNEL_VERSION({major}, {minor}, 0)\n{check}#endif\n")
                    }
                    None => check,
                };
            }
            if let Some(Err(messages)) = compile(&source) {
                wrong += &format!("<{wanted}>: {messages}\n");
            }
        }
        assert!(wrong.is_empty(), "{wrong}");
    }

    #[test]
    fn connection_state_bit_equals_the_kernels() {
        let source = format!(
            "#include <linux/netfilter/nf_conntrack_common.h>\n_Static_assert(NF_CT_STATE_BIT(IP_CT_NEW) == {}, \"\");\n",
            NF_CT_STATE_BIT(IP_CT_NEW)
        );
        // Without the header, the value is compared with that of `ct state new` in nft.
        assert_eq!(NF_CT_STATE_BIT(IP_CT_NEW), 8);
        if matches!(compile("#include <linux/netfilter/nf_conntrack_common.h>\n"), Some(Ok(()))) {
            assert_eq!(compile(&source), Some(Ok(())));
        }
    }
}
