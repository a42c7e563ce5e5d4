use super::*;
use crate::netlink::wire::Buffer;
use proptest::prelude::*;

/// Encodes an expression and hands the element of the list to a check.
fn encoded<E: Encode>(expression: &E, check: impl FnOnce(&[u8])) {
    let mut buffer = Buffer::default();
    buffer.message(1, 0, 1, &[], |a| append(a, expression));
    let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
    check(wire::attribute(message.payload, NFTA_LIST_ELEM).unwrap());
}

/// What was encoded is decoded to the same expression.
fn read_back<E: Encode>(expression: &E, expected: Expression<'_>) {
    encoded(expression, |element| assert_eq!(Expression::decode(element), Some(expected)));
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![any::<u32>().prop_map(|dreg| Access::Load { dreg }), any::<u32>().prop_map(|sreg| Access::Set { sreg })]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 1..20)
}

/// A name as the kernel takes it: it has no NUL.
fn name() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(1u8.., 1..20)
}

proptest! {
    #[test]
    fn expression_encoded_is_decoded_to_the_same(
        (a, b, c, d) in any::<(u32, u32, u32, u32)>(),
        (some, other) in any::<(Option<u32>, Option<u32>)>(),
        access in access(),
        (value, second) in (bytes(), bytes()),
        name in name(),
    ) {
        let operation = BitwiseOperation::Bool { mask: &value, xor: &second };
        let bitwise = Bitwise { sreg: a, dreg: b, operation };
        read_back(&bitwise, Expression::Bitwise(bitwise));
        let other_operation = Bitwise { operation: BitwiseOperation::Other, ..bitwise };
        read_back(&other_operation, Expression::Bitwise(other_operation));
        let cmp = Cmp { sreg: a, op: b, value: &value };
        read_back(&cmp, Expression::Cmp(cmp));
        let ct = Ct { key: a, access };
        read_back(&ct, Expression::Ct(ct));
        let fib = Fib { flags: a, result: b, dreg: c };
        read_back(&fib, Expression::Fib(fib));
        let immediate = Immediate::Value { dreg: a, value: &value };
        read_back(&immediate, Expression::Immediate(immediate));
        for chain in [None, Some(&name[..])] {
            let verdict = Immediate::Verdict { code: a, chain };
            read_back(&verdict, Expression::Immediate(verdict));
        }
        let lookup = Lookup { sreg: a, set: &name, flags: b, dreg: some };
        read_back(&lookup, Expression::Lookup(lookup));
        let meta = Meta { key: a, access };
        read_back(&meta, Expression::Meta(meta));
        let nat = Nat { kind: a, family: b, reg_addr_min: some, reg_proto_min: other, flags: c };
        read_back(&nat, Expression::Nat(nat));
        let payload = Payload { dreg: a, base: b, offset: c, len: d };
        read_back(&payload, Expression::Payload(payload));
        let range = RangeCmp { sreg: a, op: b, from: &value, to: &second };
        read_back(&range, Expression::RangeCmp(range));
        let redir = Redir { reg_proto_min: some, flags: a };
        read_back(&redir, Expression::Redir(redir));
        let reject = Reject { kind: a, icmp_code: d as u8 };
        read_back(&reject, Expression::Reject(reject));
        let socket = Socket { key: a, dreg: b, level: some };
        read_back(&socket, Expression::Socket(socket));
        let tproxy = Tproxy { family: a, reg_addr: some, reg_port: other };
        read_back(&tproxy, Expression::Tproxy(tproxy));
        read_back(&Notrack, Expression::Other("notrack"));
        read_back(&Objref { kind: a, name: "n" }, Expression::Other("objref"));
        read_back(&Byteorder { sreg: a, dreg: b, op: c }, Expression::Other("byteorder"));
    }

    #[test]
    fn expression_of_any_bytes_does_not_panic(payload in wire::odd::answer(0)) {
        Expression::decode(&payload);
    }
}

#[test]
fn payload_that_writes_is_another_expression() {
    let mut buffer = Buffer::default();
    buffer.message(1, 0, 1, &[], |a| {
        a.string(NFTA_EXPR_NAME, "payload");
        a.nest(NFTA_EXPR_DATA, |a| a.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_TRANSPORT_HEADER));
    });
    let message = wire::messages(buffer.bytes().unwrap()).next().unwrap();
    assert_eq!(Expression::decode(message.payload), Some(Expression::Other("payload")));
}
