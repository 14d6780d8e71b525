"""One commit at a run's end, of the paths that runs change and nothing else: what the user has staged stays staged."""

import fcntl
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

LOCK = Path(".dvc", "tmp", "lock")  # DVC's own, under which it writes dvc.lock
TRIES, PAUSE = 20, 0.5  # where another git is at work; seconds
TIMEOUT = 120.0  # seconds for one call


def commit(paths: Sequence[str], message: str, *, root: Path) -> str | None:
    """Commit these files and folders as they are; the commit, or None where nothing has changed.

    OSError with git's words and a remedy where that can't be done. Hooks aren't run: they are for what people write.
    """
    (root / LOCK).parent.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # no other run commits now, and no DVC writes
        present = [path for path in paths if (root / path).exists() or git("ls-files", "--", path, root=root)]
        if not present:
            return None
        git("add", "--all", "--", *present, root=root)
        if not git("diff", "--cached", "--name-only", "HEAD", "--", *present, root=root):
            return None
        git("commit", "--quiet", "--no-verify", "--only", "--message", message, "--", *present, root=root)
        return git("rev-parse", "HEAD", root=root)


def git(*arguments: str, root: Path) -> str:
    """What git prints; tried again while another git holds its lock."""
    command, env = ["git", "--literal-pathspecs", *arguments], os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    for _ in range(TRIES):
        try:
            done = subprocess.run(
                command, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise OSError(
                f"git {arguments[0]} in {root.absolute()}: no end after {TIMEOUT:g} s; call it yourself"
            ) from None
        if done.returncode == 0 or "index.lock" not in done.stderr:
            break
        time.sleep(PAUSE)
    if done.returncode != 0:
        raise OSError(
            f"git {arguments[0]} in {root.absolute()} failed: {done.stderr.strip() or done.stdout.strip()}\n"
            "What was made stays uncommitted: commit it yourself, or let the next run do it"
        )
    return done.stdout.strip()
