"""A thousand clients with fifty servers on twenty ports each, through udp_proxy.

    udp_stress.py DIRECTORY-OF-THE-PROGRAMS UDP-LOAD

Every answer is compared by the client that gets it (udp_load.c). Exits non-zero
if one is wrong, if answers are missing, or if the proxy ever had more
descriptors than it says.
"""

import os
import re
import subprocess
import threading

import hosts
from hosts import demo

SECONDS = 20
# With 4,096 descriptors, the proxy has far fewer sessions than pairs exist, and must continuously end old ones.
DESCRIPTORS = 4096


class Watch:
    """Counts the descriptors of a process repeatedly."""

    def __init__(self, pid):
        self.path, self.most, self.over = f"/proc/{pid}/fd", 0, threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.over.wait(0.01):
            self.most = max(self.most, len(os.listdir(self.path)))

    def stop(self):
        self.over.set()
        self.thread.join()
        return self.most


def load(programs, load_program, options, seconds, window, clients):
    """Returns the counts of the clients and of the proxy, and the highest number and the limit of its descriptors."""
    command = [os.path.join(programs, "udp_proxy"), *options, "3129", "5301-5320"]
    proxy = demo.Program("proxy", "sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$0" "$@"', *command)
    bound = int(re.search(r"(\d+) descriptors", proxy.expect("listening"))[1])
    watch = Watch(proxy.process.pid)
    command = demo.on("client", load_program, "ask", str(seconds), str(window), str(clients))
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + demo.PATIENCE)
    most = watch.stop()
    assert proxy.stop() == 0
    counts = outcome.stdout.split()
    counts = dict(zip(counts[::2], map(int, counts[1::2])))
    sessions = proxy.expect("sessions:")
    said = f"{outcome.stdout.strip()}; {sessions}; descriptors {most} of {bound}; {outcome.stderr}"
    print(said, flush=True)
    wrong = {name: value for name, value in counts.items() if name.startswith("wrong") and value != 0}
    assert outcome.returncode == 0 and not wrong, said
    assert most <= bound <= DESCRIPTORS, said
    evicted = int(re.search(r"evicted (\d+)", sessions)[1])
    return counts, evicted, most, said


def test(programs, load_program):
    for family, routes in (("-4", ("198.18.0.0/16", "198.19.0.0/16")), ("-6", ("2001:2:0:1::/64", "2001:2:0:2::/64"))):
        # All addresses of these networks are local on the host, and the proxy's host has routes to them.
        for host, network in zip(("client", "server"), routes):
            demo.ip(host, family, "route", "add", "local", network, "dev", "lo")
    for network, gateways in zip(
        (("198.18.0.0/16", "2001:2:0:1::/64"), ("198.19.0.0/16", "2001:2:0:2::/64")),
        (("198.51.100.2", "2001:db8:1::2"), ("203.0.113.2", "2001:db8:2::2")),
    ):
        for net, gateway in zip(network, gateways):
            demo.ip("proxy", "route", "add", net, "via", gateway)
    hosts.meet()
    server = demo.Program("server", load_program, "serve")
    assert server.expect("listening") != "nothing"

    # The replies pace the load, so that no datagram may be lost.
    counts, evicted, most, said = load(programs, load_program, [], SECONDS, 128, 1000)
    assert counts["lost"] * 1000 <= counts["asked"], said
    # All clients, servers and ports were used, and the limit was reached and not exceeded.
    assert counts["pairs"] > 20_000 and evicted > 0 and most > DESCRIPTORS * 9 // 10, said

    # Sessions end while replies are in flight, and the same clients open new ones: replies may be lost, but must not reach a wrong
    # client.
    counts, evicted, _, said = load(programs, load_program, ["--sessions", "50"], 3, 400, 4)
    assert counts["answered"] > 1_000 and evicted > 1_000, said


if __name__ == "__main__":
    hosts.alone(__file__, test)
