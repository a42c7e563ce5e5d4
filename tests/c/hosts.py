"""The hosts of the demo, for tests that run functions on these hosts in their own process."""

import ctypes
import os
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples-c"))
import demo  # noqa: E402
from demo import limit  # noqa: E402, F401


def on(host, body):
    """Runs a function in a thread on a host. Returns its result, or raises its exception."""
    result = []

    def run():
        try:
            enter(demo.namespaces[host])
            result.append((body(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def enter(fd):
    if ctypes.CDLL(None, use_errno=True).setns(fd, demo.CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def meet():
    """Waits until client and server reach each other: neighbor discovery may take a second."""

    def refused(family, server):
        deadline = time.monotonic() + demo.PATIENCE
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(0.1)
            client.connect((server, 9))
            while time.monotonic() < deadline:
                try:
                    client.send(b"")
                    client.recv(1)
                except ConnectionRefusedError:
                    return True
                except TimeoutError:
                    pass
        return False

    for family, (_, _, server) in zip((socket.AF_INET, socket.AF_INET6), demo.FETCHES):
        assert on("client", lambda family=family, server=server: refused(family, server)), f"no way to {server}"


def checksum(data):
    """Returns the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(addr):
    return socket.inet_pton(socket.AF_INET6 if ":" in addr else socket.AF_INET, addr)


def datagram(src, src_port, dst, dst_port, data):
    """Returns the EtherType and an IP packet with a UDP datagram; src and dst may be any addresses."""
    src, dst, length = packed(src), packed(dst), 8 + len(data)
    head = struct.pack("!HHHH", src_port, dst_port, length, 0)
    check = checksum(src + dst + struct.pack("!IHBB", length, 0, 0, socket.IPPROTO_UDP) + head + data) or 0xFFFF
    body = head[:6] + struct.pack("!H", check) + data
    if len(src) == 16:
        return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + src + dst + body
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_UDP, 0)
    ip = ip[:10] + struct.pack("!H", checksum(ip + src + dst)) + src + dst
    return b"\x08\x00" + ip + body


def inject(packets):
    """Sends forged packets from the client's link to the proxy."""

    def body():
        link = demo.run(*demo.on("proxy", "ip", "-o", "link", "show", "eth0"))
        proxy = bytes.fromhex(link.split("link/ether ")[1].split()[0].replace(":", ""))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            own = sock.getsockname()[4]
            for packet in packets:
                sock.send(proxy + own + packet)

    on("client", body)


def textbook(protocol, port):
    """Adds a TPROXY rule of another program, without exceptions: all packets to the port go to the proxy's listener."""
    rules = f"""table inet textbook {{
        chain prerouting {{
            type filter hook prerouting priority -160
            iifname eth0 {protocol} dport {port} tproxy to :3129 meta mark set 0x2000 accept
        }}
    }}"""
    demo.run(*demo.on("proxy", "nft", rules))


def metadata_service():
    """Adds addresses of metadata services to the server's host, and routes to them on the proxy's host."""
    addresses = ("169.254.169.254", "fd00:ec2::254")
    for addr, gateway in zip(addresses, ("203.0.113.2", "2001:db8:2::2")):
        demo.run(*demo.on("server", "ip", "addr", "add", addr, "dev", "lo"))
        demo.run(*demo.on("proxy", "ip", "route", "add", addr, "via", gateway))
    return addresses


def alone(file, test):
    """Runs a test with the hosts in new namespaces, which end with it. The test gets the arguments of this program."""
    if sys.argv[1] != "--inside":
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        new = ["unshare", *user, "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(new[0], [*new, sys.executable, file, "--inside", *map(os.path.abspath, sys.argv[1:])])
    demo.build_network()
    test(*sys.argv[2:])
