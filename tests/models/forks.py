"""Processes that run `dod_models.cli`, started in milliseconds: forks of one that has imported torch.

Each is the real program from there on, and can be killed like any other.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = """
import ctypes, faulthandler, json, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no child outlives the tests (linux/prctl.h: PR_SET_PDEATHSIG)
from dod_models import cli, train
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    faulthandler.dump_traceback_later(150)  # one that hangs says where
    try:
        code = cli.main(order["arguments"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
PATIENCE = 200  # seconds


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
            cwd=Path(__file__).parents[2],
        )
        assert self.ask(None) == "ready"

    def ask(self, order: dict[str, Any] | None) -> str:
        """Its answer."""
        assert self.server.stdin is not None and self.server.stdout is not None
        if order is not None:
            self.server.stdin.write(json.dumps(order) + "\n")
            self.server.stdin.flush()
        return self.server.stdout.readline().strip()

    def start(self, arguments: list[str], *, log: Path, **environment: str) -> "Child":
        """Fork a child that runs the stage."""
        order = {"arguments": arguments, "log": str(log), "environment": environment}
        return Child(int(self.ask(order)), log, lambda pid: int(self.ask({"wait": pid})))

    def team(self, arguments: list[str], *, size: int, log: Path) -> list["Child"]:
        """Several processes that train together."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        return [
            self.start(
                arguments,
                log=log.with_name(f"{log.name}.{rank}"),
                **meeting,
                **world,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank in range(size)
        ]

    def end(self) -> None:
        self.server.kill()
        self.server.communicate()


class Child:
    """A process of the program, and what it prints."""

    def __init__(self, pid: int, log: Path, wait: Callable[[int], int]) -> None:
        self.pid, self.log, self.begun = pid, log, time.time_ns()
        self.reap = wait

    def wait(self) -> int:
        """Its exit status, negative if a signal ended it."""
        end = time.monotonic() + PATIENCE
        while self.alive():
            assert time.monotonic() < end, self.text
            time.sleep(0.002)
        return self.reap(self.pid)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def alive(self) -> bool:
        """False once it is a zombie."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def until(self, fact: Callable[[], bool]) -> bool:
        """Wait for the fact; False if the process ends before."""
        end = time.monotonic() + PATIENCE
        while not fact():
            assert time.monotonic() < end, self.text
            if not self.alive():
                return fact()
            time.sleep(0.0005)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def arguments(config: dict[str, Any], latents: Path, root: Path) -> list[str]:
    """The command line of a training below `root`."""
    paths = {"--out": root / "train", "--latents": latents, "--state": root / "state", "--facts": root / "facts.json"}
    return ["train", "--config", json.dumps(config), *(text for pair in paths.items() for text in map(str, pair))]
