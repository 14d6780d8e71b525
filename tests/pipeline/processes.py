"""The processes that work in a project: who they are, and waiting for them to come and go."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from .project import Project, environment

POLL = 0.02  # seconds
STARTED: list[subprocess.Popen[bytes]] = []


def end_all() -> None:
    """Kill what a test that failed has left, and wait for it."""
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def role(process: psutil.Process) -> str:
    """Run, dvc (`dvc status` apart), stage, worker of a training, or what else runs in a project."""
    words = process.cmdline()
    names = [Path(word).name for word in words[:3]]
    if "dod_models.cli" in words and "torch.distributed.run" not in words:
        return "worker"
    for name, following in zip(names, words[1:4], strict=False):
        if name == "dod" and following in ("run", "stage"):
            return following
    if "repro" in words:
        return "dvc"
    if "status" in words:
        return "dvc status"
    return "dagster" if names[1:2] == ["dagster"] or "dagster" in " ".join(words) else "other"


def alive(root: Path) -> dict[psutil.Process, str]:
    """Processes whose current folder is the project's, or lies in it, by role; zombies are not alive."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(root):
                found[process] = role(process)
    return {process: name for process, name in found.items() if process.is_running()}


def wait_for(fact: Callable[[], bool], seconds: float) -> bool:
    """Whether it becomes true within that time."""
    end = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def assert_all_end(root: Path, seconds: float) -> None:
    """Nothing runs in the project after so many seconds."""
    assert wait_for(lambda: not alive(root), seconds), {p.pid: p.cmdline() for p in alive(root)}


class Command:
    """A command that was started in a project, in its own process group, as a shell's job is; it logs to a file."""

    def __init__(self, project: Project, *words: str, **env: str) -> None:
        self.root, self.begun = project.root, time.monotonic()
        self.log = project.root.parent / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                words,
                cwd=project.root,
                env=environment(**env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        STARTED.append(self.process)
        self.seen: set[str] = set()
        self.stages = 0  # that have begun

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def phase(self) -> str:
        """What the command, a `dod run`, is doing; "over" once it has ended."""
        if self.process.poll() is not None:
            return "over"
        now = set(alive(self.root).values())
        if "stage" in now and "stage" not in self.seen:
            self.stages += 1
        self.seen = (self.seen - {"stage"} if "dvc" not in now else self.seen) | now
        if "stage" in now:
            return "stage"
        if "dvc" in now:
            return "dvc after the stage" if "stage" in self.seen else "dvc before the stage"
        if "dvc status" in now:
            return "dvc status"
        return ("dagster" if self.stages else "dagster's start") if "dvc status" in self.seen else "start"

    def reach(self, phase: str, *, stages: int = 0, seconds: float = 240) -> bool:
        """Wait until that phase, after so many stages have begun; False if the command ends before."""
        found = ""

        def there() -> bool:
            nonlocal found
            found = self.phase()
            return found == "over" or (found == phase and self.stages >= stages)

        assert wait_for(there, seconds), self.text
        return found != "over"

    def end(self, seconds: float) -> int:
        """Its exit status, once it has ended by itself; AssertionError with what it printed after that time."""
        assert wait_for(lambda: self.process.poll() is not None, seconds), self.text
        return self.process.wait()


def kill_first(root: Path, victim: str) -> bool:
    """SIGKILL to the process of that role that began first; False if there is none any more."""
    found = [process for process, name in alive(root).items() if name == victim]
    with suppress(ValueError, psutil.NoSuchProcess):
        min(found, key=lambda process: process.create_time()).send_signal(signal.SIGKILL)
        return True
    return False
