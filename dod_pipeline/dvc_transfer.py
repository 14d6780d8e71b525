"""`dvc push` and `dvc pull` in a bounded time. What is to be pushed is noted first, and struck off once it was: so what
a dead remote or a killed process left behind goes with the next push."""

import configparser
import fcntl
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from dod_pipeline import dvc_repo
from dod_pipeline.lifeline import held

OWED = Path(".dvc", "tmp", "dod", "owed.json")
LOCAL = Path(".dvc", "config.local")  # settings of this folder, which git does not keep


class Remote(NamedTuple):
    """A place for outputs, under a name; what DVC fetches from it is checked."""

    name: str
    url: str
    options: tuple[tuple[str, str], ...] = ()  # of `dvc remote modify`, e.g. ("endpointurl", "https://HOST")

    @property
    def settings(self) -> dict[str, str]:
        """What DVC is to know of it."""
        return {"url": self.url, "verify": "true", **dict(self.options)}


Notes = dict[str, str]  # stage instance -> a token of when it was made, so that one made during a push stays owed


def owe(names: Iterable[str], *, root: Path) -> None:
    """Note stage instances whose outputs the remote shall have."""
    with noted(root) as file:
        note(file, read(file) | {name: uuid.uuid4().hex for name in names})


def owed(root: Path) -> Notes:
    """Stage instances whose outputs the remote may not have yet."""
    with noted(root) as file:
        return read(file)


def use(remote: Remote, *, root: Path) -> None:
    """Make it the default remote of this folder, by commands of dvc, if it is not; whoever calls dvc then uses it, too.

    Settings in the file that git keeps stay as they are.
    """
    lock = root / OWED.with_name("remote.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error):  # of which dvc will speak
            known.read(root / LOCAL)
        section = f"'remote \"{remote.name}\"'"
        found = dict(known[section]) if known.has_section(section) else {}
        if found == remote.settings and known.get("core", "remote", fallback=None) == remote.name:
            return
        dvc_repo.text("remote", "add", "--local", "--force", "--default", remote.name, remote.url, root=root)
        for name, value in remote.settings.items():
            if name != "url":
                dvc_repo.text("remote", "modify", "--local", remote.name, name, value, root=root)


def settle(known: Iterable[str], *, root: Path, timeout: float) -> None:
    """Push all that is noted, in one call; OSError with the remote and a remedy where that fails or takes too long.

    What is not `known` any more, because dvc.yaml has changed, is forgotten.
    """
    done = owed(root)
    targets = sorted(done.keys() & set(known))
    if targets:
        transfer("push", targets, root=root, timeout=timeout)
    with noted(root) as file:
        note(file, {name: token for name, token in read(file).items() if done.get(name) != token})


def pull(targets: list[str], *, root: Path, timeout: float) -> None:
    """Fetch what dvc.lock names and the remote has; OSError as for `settle`, and where it has other bytes.

    Allowed to leave out what is missing, dvc says nothing of what it refused, and calls it deleted afterwards.
    """
    transfer("pull", ["--allow-missing", *targets], root=root, timeout=timeout)
    left = json.loads(transfer("status", ["--cloud", "--json", *targets], root=root, timeout=timeout))
    refused = sorted(name for name, state in left.items() if state == "deleted")
    if refused:
        raise OSError(
            f"dvc pull, remote {remote(root)}: refused {', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}: "
            "the bytes there are not those whose md5 dvc.lock names. Remove that object there and .dvc/tmp in a clone "
            "that has the file, and `dvc push` from it; or make it again with `dod run`"
        )


def transfer(what: str, arguments: list[str], *, root: Path, timeout: float) -> str:
    """Run one transfer; what dvc prints. All its processes are killed when its time is over."""
    command = held([dvc_repo.executable(), "--wait-for-lock", what, *arguments])
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with (
        dvc_repo.shared(root),
        subprocess.Popen(
            command,
            cwd=root,
            env=dvc_repo.environment(),
            stdin=none,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        ) as process,
    ):
        try:
            printed, said = process.communicate(timeout=timeout)
            why = f"dvc: {process.returncode}): {dvc_repo.last_lines(said)}"
        except subprocess.TimeoutExpired:
            why = f"no end after {timeout:g} s)"
        finally:
            dvc_repo.signal_group(process, signal.SIGKILL)
    if process.returncode != 0:
        raise OSError(
            f"dvc {what}, remote {remote(root)}, failed ({why}\nWhat was computed stays here. Look at the remote with "
            f"`dvc remote list`; the next {what} goes on, or call `dvc {what}` yourself"
        )
    return printed.decode()


def remote(root: Path) -> str:
    """The default remote and its URL, without what may be secret in it."""
    try:
        found = dvc_repo.text("remote", "list", root=root)
    except OSError:
        return "(unknown)"
    names = [line.split()[:2] for line in found.splitlines() if line.endswith("(default)")]
    return (
        " ".join([names[0][0], names[0][1].rpartition("@")[2]]) if names else "(none is set: `dvc remote default NAME`)"
    )


@contextmanager
def noted(root: Path) -> Iterator[TextIO]:
    """The file of notes, for one process at a time."""
    path = root / OWED
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def read(file: TextIO) -> Notes:
    """What the file holds."""
    file.seek(0)
    try:
        return dict(json.loads(file.read() or "{}"))
    except ValueError:  # a full disk, or the power: what is missing is made good by a `dvc push`
        return {}


def note(file: TextIO, notes: Notes) -> None:
    """Write it anew."""
    file.truncate(0)
    file.write(json.dumps(notes))
    file.flush()
    os.fsync(file.fileno())
