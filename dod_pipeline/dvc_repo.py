"""The only file that calls dvc. It lives in an environment of its own, behind the launcher `.venv/bin/dvc`."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any, TextIO
from urllib.parse import quote, unquote

from dod_pipeline.dvc_graph import DVC_LOCK, check_conflict
from dod_pipeline.dvc_wreck import is_committed, is_cut_off, is_dead
from dod_pipeline.lifeline import CALLER, held

# How dvc says that another one holds its lock, and that a transfer broke off.
BUSY = re.compile("acquire lock|is busy|has locked", re.IGNORECASE)
PASSING = re.compile(f"ERROR: .*({BUSY.pattern}|failed to (push|pull|fetch|transfer)|timed? ?out)", re.IGNORECASE)
NO_ROOM = "No possible cache link types"
NOISE = re.compile(r"\d+%\||^WARNING: Process .* had been killed")  # tqdm's progress bars; a lock that dvc cleared
ADVICE = re.compile(
    rb"\s*$|(Updating|Generating) lock file |To (track|enable) .*, run:|\tgit add |\tdvc config |Use `dvc push`"
)
RETRY_PAUSES = (1.0, 2.0, 4.0)  # seconds
GRACE = 100.0  # seconds that an interrupted stage has to end: a training saves
INTERRUPTS = 25  # in that time
LAST_WORDS = 5.0  # seconds that dvc's last output may take to arrive
COPIES = Path(".dvc", "tmp", "dod")  # copies of dvc.lock


def executable() -> str:
    """Path of the launcher beside this Python, or of a dvc on PATH."""
    beside = Path(sys.executable).parent / "dvc"
    found = str(beside) if beside.exists() else shutil.which("dvc")
    if found is None:
        raise FileNotFoundError(f"{beside}: no dvc there, nor on PATH; run `make setup`")
    return found


def environment() -> dict[str, str]:
    """This process's environment with `dod` and `python` of this environment first on PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def call(*arguments: str) -> int:
    """Run dvc with this terminal; returns its exit status."""
    return subprocess.run([executable(), *arguments], env=environment()).returncode


def text(*arguments: str, root: Path = Path(), patient: bool = False) -> str:
    """Run dvc; what it prints. OSError with its message if it fails, BusyError where that passes.

    Where another dvc has locked the folder: wait for it, a few seconds or, if patient, as long as it takes.
    """
    command, pauses = held([executable(), *arguments]), (*RETRY_PAUSES, None)
    for pause in chain(RETRY_PAUSES, repeat(RETRY_PAUSES[-1])) if patient else pauses:
        done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
        if done.returncode == 0 or pause is None or not BUSY.search(done.stderr):
            break
        if pause == RETRY_PAUSES[0] and patient:
            print(f"another dvc is at work in {root.absolute()}; waiting for it", flush=True)
        time.sleep(pause)
    if done.returncode != 0:
        kind = BusyError if BUSY.search(done.stderr) else OSError
        raise kind(
            f"dvc {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def address(stage: str, key: str) -> str:
    """DVC's name of a stage instance."""
    return f"{stage}@{key}"


def status(targets: list[str], *, root: Path = Path(), patient: bool = False) -> dict[str, Any]:
    """What changed of these stage instances and of what they are made from, or of all, by instance; empty where there
    is nothing to do. ValueError where git left a conflict."""
    check_conflict(root / DVC_LOCK)
    upstream = ["--with-deps"] if targets else []
    changed: dict[str, Any] = json.loads(text("status", "--json", *upstream, *targets, root=root, patient=patient))
    return changed


class TryAgainError(OSError):
    """DVC failed for a reason that passes: a transfer broke off."""


class BusyError(TryAgainError):
    """Another DVC holds a lock, for as long as its stage takes."""


_alone: set[Path] = set()  # folders of which this process holds the lock alone


@contextmanager
def alone(root: Path = Path(), *, wait: bool = True) -> Iterator[None]:
    """Wait until no other `dod` runs stages in this folder, where DVC would say "busy" and fail; then keep all out.

    BlockingIOError without `wait`.
    """
    with lock_file(root).open("a") as file:
        if wait:
            take(file, fcntl.LOCK_EX, f"running stages in {root.absolute()}")
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mend(root)
        _alone.add(root.absolute())
        try:
            yield
        finally:
            _alone.remove(root.absolute())


@contextmanager
def shared(root: Path = Path()) -> Iterator[None]:
    """Wait until no other `dod` has this folder alone, unless this process does; then keep those out who want it so."""
    if root.absolute() in _alone:
        yield
        return
    with lock_file(root).open("a") as file:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mend(root)  # nobody else is here
        take(file, fcntl.LOCK_SH, f"running stages in {root.absolute()}")
        yield


def lock_file(root: Path) -> Path:
    """The file that `dod` locks; the lock dies with its holder."""
    path = root / ".dvc" / "tmp" / "dod.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def take(file: IO[str], kind: int, what: str) -> None:
    """Take a lock; say so before waiting for it: another `dod` is doing `what`."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another dod is {what}; waiting for it", flush=True)
        fcntl.flock(file, kind)


def mend(root: Path) -> None:
    """Undo what a killed dvc left half-written: its table of locks, and dvc.lock, of which `repro_one` keeps copies."""
    table, lock = root / ".dvc" / "tmp" / "rwlock", root / DVC_LOCK
    if is_dead(table):
        table.unlink()
    for copy in sorted((root / COPIES).glob("*.yaml")):
        if is_cut_off(lock, copy) and not is_committed(lock):
            print(
                f"{lock}: dvc was killed while it wrote this; put back as it was before {unquote(copy.stem)}",
                flush=True,
            )
            os.replace(copy, lock)
        else:
            copy.unlink()


def copy_lock(root: Path, target: str) -> Path:
    """Keep a copy of dvc.lock while dvc runs, which writes it in place: `mend` puts it back if dvc is killed then."""
    lock, copy = root / DVC_LOCK, root / COPIES / f"{quote(target, safe='@')}.yaml"
    if lock.exists():
        partial = copy.with_suffix(".partial")
        shutil.copyfile(lock, partial)
        os.replace(partial, copy)
    return copy


def repro_one(target: str, *, root: Path, env: Mapping[str, str] | None = None) -> None:
    """`dvc repro --single-item`: its output goes to this process's, and nothing of it outlives this call.

    TryAgainError for what passes, OSError with the last lines of dvc and the stage for the rest. An interrupt is handed
    on, and waited for. Who makes the same at the same time is waited for.
    """
    (root / COPIES).mkdir(parents=True, exist_ok=True)
    with (root / COPIES / f"{quote(target, safe='@')}.lock").open("a") as file:
        take(file, fcntl.LOCK_EX, f"making {target} in {root.absolute()}")
        repro_locked(target, root=root, env=env)


def repro_locked(target: str, *, root: Path, env: Mapping[str, str] | None) -> None:
    """`repro_one` for the one who has the target."""
    command = held([executable(), "--wait-for-lock", "repro", "--single-item", target])
    variables = environment() | {CALLER: str(os.getpid())} | dict(env or {})
    copy = copy_lock(root, target)
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    said: deque[bytes] = deque(maxlen=64)  # blocks of what went to stderr
    over = threading.Event()  # interrupted: what is still said of that, tracebacks at worst, is of no use
    with subprocess.Popen(
        command, cwd=root, env=variables, stdin=none, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        readers = [
            threading.Thread(target=forward_lines, args=(process.stdout,), daemon=True),
            threading.Thread(target=forward, args=(process.stderr, said, over), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            code = process.wait()
        except BaseException:
            over.set()
            stop(process)
            raise
        finally:
            signal_group(process, signal.SIGKILL)  # what dvc may have left behind, if it was killed itself
            for reader in readers:
                reader.join(timeout=LAST_WORDS)
    if code >= 0:
        copy.unlink(missing_ok=True)
    elif root.absolute() in _alone:  # before the next stage's dvc writes to what this one has cut off
        mend(root)
    if code != 0:
        text = last_lines(b"".join(said))
        if NO_ROOM in text:
            text += f"\n(dvc says so on a full disk, too: {shutil.disk_usage(root).free:,} bytes are free)"
        how = f"dvc was killed by signal {-code}" if code < 0 else f"dvc: {code}"
        raise kind_of(text)(f"{target} failed ({how}): {text}")


def kind_of(text: str) -> type[OSError]:
    """The error for what dvc says: whether a failure may be gone the next time, and when."""
    found = PASSING.search(text)
    if found is None or "No space left" in text:
        return OSError
    return BusyError if BUSY.search(found[0]) else TryAgainError


def forward_lines(source: IO[bytes]) -> None:
    """Copy a process's lines to this one's stdout as they come, without what dvc advises after every stage."""
    with suppress(OSError, ValueError):  # closed, because an interrupt came while its end was awaited
        for line in source:
            if not ADVICE.match(line):
                show(sys.stdout, line)


def forward(source: IO[bytes], said: deque[bytes], over: threading.Event) -> None:
    """Copy a process's stderr to this one's as it comes, progress bars included, and remember the end of it."""
    with suppress(OSError, ValueError):
        while block := os.read(source.fileno(), 4096):
            said.append(block)
            if not over.is_set():
                show(sys.stderr, block)


def show(stream: TextIO, text: bytes) -> None:
    """Print; what can't be shown, because Dagster's copy of it fills a disk, must not keep dvc waiting."""
    with suppress(OSError):
        stream.write(text.decode(errors="replace"))
        stream.flush()


def last_lines(said: bytes, number: int = 12) -> str:
    """The last lines without progress bars, which return the carriage, and without dvc's advertising."""
    lines = [line.rpartition("\r")[2].strip() for line in said.decode(errors="replace").split("\n")]
    return "\n".join([line for line in lines if line and not NOISE.search(line)][-number:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt dvc and its stage, as Ctrl-C does, again and again: libraries that are being imported may swallow it.
    Kill what hasn't ended in time."""
    for _ in range(INTERRUPTS):
        signal_group(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE / INTERRUPTS)
            return
    signal_group(process, signal.SIGKILL)
    process.wait()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to all that are left of a process's session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def accept(targets: list[str]) -> None:
    """`dvc commit --force`: record the present code, params and outputs as belonging together."""
    code = call("commit", "--force", *targets)
    if code != 0:
        raise OSError(
            f"dvc commit failed ({code}); the message above says why. Nothing was recorded for the failing stage"
        )
