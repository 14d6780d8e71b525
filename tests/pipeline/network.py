"""Hosts with addresses of their own, in network namespaces on this machine: a hub, which is the test's, and nodes."""

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

NAMESPACE = 0x40000000  # CLONE_NEWNET of linux/sched.h
HUB = "10.77.0.1"
numbers = itertools.count(2)


def lacks() -> str | None:
    """Why this machine can't have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    return None if shutil.which("ip") else "network namespaces want the command ip (apt-get install iproute2)"


def ip(*words: str) -> str:
    """Run `ip`."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Host(NamedTuple):
    """A node: its namespace and address."""

    name: str
    address: str

    def command(self, words: list[str], *, tmp: Path) -> list[str]:
        """The command, to be run there, with a /tmp of its own, and processes that all end together."""
        inside = ["sh", "-c", 'mount --bind "$0" /tmp && "$@" && exec sleep infinity', str(tmp), *words]
        return ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *inside]

    def pids(self) -> list[int]:
        """Its processes."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """End all of them at once, as the loss of a machine does."""
        end = time.monotonic() + 30
        while found := self.pids():
            assert time.monotonic() < end, found
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


class Network:
    """A hub that this thread, and what it starts, has entered; hosts are added to it."""

    def __init__(self) -> None:
        self.name, self.hosts = f"dod-{os.getpid()}", list[Host]()

    def add(self) -> Host:
        """A new host, connected to the hub."""
        number = next(numbers)
        host, link = Host(f"{self.name}-{number}", f"10.77.0.{number}"), f"veth{number}"
        ip("netns", "add", host.name)
        self.hosts.append(host)
        ip("-n", self.name, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        ip("-n", self.name, "link", "set", link, "master", "bridge", "up")
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for name in ("eth0", "lo"):
            ip("-n", host.name, "link", "set", name, "up")
        return host


@contextmanager
def network() -> Iterator[Network]:
    """A hub and no hosts; all processes of its hosts end with it."""
    found, home = Network(), os.open("/proc/self/ns/net", os.O_RDONLY)
    ip("netns", "add", found.name)
    try:
        ip("-n", found.name, "link", "add", "bridge", "type", "bridge")
        ip("-n", found.name, "addr", "add", f"{HUB}/24", "dev", "bridge")
        for name in ("bridge", "lo"):
            ip("-n", found.name, "link", "set", name, "up")
        with open(f"/run/netns/{found.name}") as namespace:
            enter(namespace.fileno())
        yield found
    finally:
        enter(home)
        os.close(home)
        for host in found.hosts:
            host.kill()
            ip("netns", "delete", host.name)
        ip("netns", "delete", found.name)


def enter(namespace: int) -> None:
    """Move this thread, and what it will start, to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, NAMESPACE) != 0:
        raise OSError(ctypes.get_errno(), "setns")
