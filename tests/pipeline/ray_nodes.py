"""A real Ray cluster on hosts of `network`: a head, where nothing is computed, and nodes. Tokens are demanded."""

import os
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from dod_pipeline.config import ENDPOINT
from dod_pipeline.lifeline import held

from .bucket import S3
from .network import Host, Network

BIN = Path(sys.executable).parent
MEMORY = str(100 * 2**20)  # bytes of a node's object store


class Cluster:
    """The head's address, and the nodes; `environment` is what whoever uses the cluster must have set."""

    def __init__(self, net: Network, folder: Path, s3: S3) -> None:
        self.net, self.folder, self.s3, self.nodes = net, folder, s3, list[Host]()
        self.started = list[subprocess.Popen[bytes]]()
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        access = {
            name: value for name, value in s3.environment().items() if name != "AWS_ENDPOINT_URL_S3"
        }  # jobs say it
        self.variables = self.environment | access | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self.head = self.start_head()

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{self.head.address}:8265"

    def start_head(self) -> Host:
        """A head on a host of its own, which has answered."""
        host = self.net.add()
        options = ["--head", "--port=6379", f"--dashboard-host={host.address}", "--num-cpus=0"]
        self.start(host, options, wait_for=f"{host.address}:8265")
        self.head = host
        return host

    def add_node(self) -> Host:
        """A node with one CPU, which has joined."""
        host = self.net.add()
        self.start(host, [f"--address={self.head.address}:6379", "--num-cpus=1"], wait_for="Ray runtime started")
        self.nodes.append(host)
        return host

    def running(self, host: Host) -> str:
        """The command lines of a host's processes."""
        found = []
        for pid in host.pids():
            with suppress(psutil.NoSuchProcess):
                found.append(" ".join(psutil.Process(pid).cmdline()))
        return "\n".join(found)

    def lose(self, *hosts: Host) -> None:
        """End all that runs on these machines, at once."""
        for host in hosts:
            host.kill()
        self.nodes = [host for host in self.nodes if host not in hosts]

    def start_anew(self) -> None:
        """Another head, and two nodes."""
        self.lose(*self.nodes)
        self.start_head()
        self.add_node()
        self.add_node()

    def start(self, host: Host, options: list[str], *, wait_for: str) -> None:
        """`ray start` on a host, until it says so."""
        tmp = self.folder / host.name
        (tmp / "home").mkdir(parents=True)
        words = [str(BIN / "ray"), "start", f"--node-ip-address={host.address}", "--disable-usage-stats"]
        words += [f"--object-store-memory={MEMORY}", *options]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": "/tmp/home", "DOD_CACHE": "/tmp/cache", "PATH": path}
        theirs = {name: value for name, value in os.environ.items() if name != ENDPOINT}  # each job brings its own
        with self.log(host).open("w") as log:
            self.spawn(host.command(words, tmp=tmp), log, theirs | self.variables | own)
        end = time.monotonic() + 120
        while wait_for not in self.log(host).read_text():
            assert time.monotonic() < end, self.log(host).read_text()[-3000:]
            time.sleep(0.2)

    def spawn(self, words: list[str], log: IO[Any], env: dict[str, str]) -> None:
        """Start a process that dies with this one."""
        none = subprocess.DEVNULL
        started = subprocess.Popen(held(words), stdin=none, stdout=log, stderr=log, env=env, cwd="/")
        self.started.append(started)

    def end(self) -> None:
        """End all machines."""
        self.lose(self.head, *self.nodes)
        for process in self.started:
            process.wait(timeout=30)

    def log(self, host: Host) -> Path:
        """What a host's Ray has said."""
        return self.folder / f"{host.name}.log"
