"""A real Ray cluster on hosts of `network`: a head, where nothing is computed, and nodes. Tokens are demanded."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dod_pipeline.lifeline import held

from .network import Host, Network, network

BIN = Path(sys.executable).parent
MEMORY = str(100 * 2**20)  # bytes of a node's object store


class Cluster:
    """The head's address, and the nodes; `environment` is what whoever uses the cluster must have set."""

    def __init__(self, net: Network, folder: Path, variables: dict[str, str]) -> None:
        self.net, self.folder = net, folder
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.variables = self.environment | variables | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self.head = self.start_head()

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{self.head.address}:8265"

    def start_head(self) -> Host:
        """A head on a host of its own, which has answered."""
        host = self.net.add()
        options = ["--head", "--port=6379", f"--dashboard-host={host.address}", "--num-cpus=0"]
        self.start(host, options, wait_for="Ray runtime started")
        self.head = host
        return host

    def add_node(self) -> Host:
        """A node with one CPU, which has joined."""
        host = self.net.add()
        self.start(host, [f"--address={self.head.address}:6379", "--num-cpus=1"], wait_for="Ray runtime started")
        return host

    def start(self, host: Host, options: list[str], *, wait_for: str) -> None:
        """`ray start` on a host, until it says so."""
        tmp = self.folder / host.name
        (tmp / "home").mkdir(parents=True)
        words = [str(BIN / "ray"), "start", f"--node-ip-address={host.address}", "--disable-usage-stats"]
        words += [f"--object-store-memory={MEMORY}", *options]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": "/tmp/home", "DOD_CACHE": "/tmp/cache", "PATH": path}
        with self.log(host).open("w") as log:
            self.spawn(host.command(words, tmp=tmp), log, dict(os.environ) | self.variables | own)
        end = time.monotonic() + 120
        while wait_for not in self.log(host).read_text():
            assert time.monotonic() < end, self.log(host).read_text()[-3000:]
            time.sleep(0.2)

    def spawn(self, words: list[str], log: IO[Any], env: dict[str, str]) -> None:
        """Start a process that dies with this one."""
        subprocess.Popen(held(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=self.folder)

    def log(self, host: Host) -> Path:
        """What a host's Ray has said."""
        return self.folder / f"{host.name}.log"


@contextmanager
def cluster(folder: Path, variables: dict[str, str], net: Network, *, nodes: int = 2) -> Iterator[Cluster]:
    """A cluster; it ends with the network."""
    found = Cluster(net, folder, variables)
    for _ in range(nodes):
        found.add_node()
    yield found


__all__ = ["Cluster", "cluster", "network"]
