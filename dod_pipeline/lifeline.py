"""A process that ends with the one that started it, whatever ended that: nothing is left behind that goes on writing.

Linux tells a process of its parent's death. Elsewhere nothing does: there an orphan finishes its stage, and the lock on
its output folder (`dod_models.artifact.locked`) keeps others out until then.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CALLER = "DOD_CALLER"  # environment: pid of the process that called dvc
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold(ancestor: int | None = None) -> None:
    """Be killed when the parent dies; SystemExit if `ancestor` isn't above this process, because it died before."""
    if sys.platform != "linux":
        return
    import ctypes

    import psutil

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if ancestor is not None and ancestor not in (process.pid for process in psutil.Process().parents()):
        sys.exit(f"{' '.join(sys.argv)}: process {ancestor}, for which this was to run, has ended")


def held(command: list[str]) -> list[str]:
    """The command, so that it dies with the process that starts it."""
    return [sys.executable, "-m", "dod_pipeline.lifeline", str(os.getpid()), *command]


@contextmanager
def unheeding() -> Iterator[None]:
    """SIGTERM and Ctrl-C have no effect: whoever sent one is obeyed already, and dvc's stop repeats it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    hold(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
