"""`make bench-overhead`: what Dagster and DVC cost the demo beside its bare stages, and how fast commands answer.

The demo is made in a clone below `.state/` with a cache of its own. While it runs, the lives of the processes `dod
stage` are watched: what is not in them is overhead. Writes Markdown to stdout.
"""

import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks import clone

EXPERIMENT = "mnist"
POLL = 0.1  # seconds
BIN = Path(sys.executable).parent

Life = tuple[float, float]  # of a process, in Unix time


def watch(over: threading.Event, lives: dict[str, Life]) -> None:
    """Note when each stage's process began, and when it was last seen."""
    while not over.wait(POLL):
        for process in psutil.process_iter(["cmdline", "create_time"]):
            words = process.info["cmdline"] or []
            if [Path(word).name for word in words[1:2]] == ["dod"] and words[2:3] == ["stage"]:
                lives[f"{words[3]}@{words[4]}"] = (process.info["create_time"], time.time())


def seconds(root: Path, *command: str) -> float:
    """How long a command takes; what it says goes to stderr."""
    began = time.monotonic()
    words = [str(BIN / command[0]), *command[1:]]
    subprocess.run(words, cwd=root, env=clone.environment(root), stdout=sys.stderr, check=True)
    return time.monotonic() - began


def answer(root: Path) -> float:
    """How long `dagster dev` takes until its pages answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    began = time.monotonic()
    command = [str(BIN / "dagster"), "dev", "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, cwd=root, env=clone.environment(root), stdout=sys.stderr) as process:
        while process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=1):
                break
            time.sleep(POLL)
        found, ended = time.monotonic() - began, process.poll()
        process.terminate()
    if ended is not None:
        sys.exit(f"dagster dev ended with {ended}, as it says above")
    return found


def main() -> None:
    """Measure and print."""
    shutil.rmtree(clone.ROOT / ".state" / "overhead", ignore_errors=True)
    root = clone.at_this_commit("overhead", apart=True)
    lives: dict[str, Life] = {}
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(over, lives))
    watcher.start()
    try:
        whole = seconds(root, "dod", "run", EXPERIMENT)
    finally:
        over.set()
        watcher.join()
    bare = {name: end - begin for name, (begin, end) in lives.items()}
    print("| stage | seconds of its process |\n|---|---:|")
    for name, spent in bare.items():
        print(f"| {name} | {spent:.1f} |")
    print(f"| all | {sum(bare.values()):.1f} |\n| `dod run {EXPERIMENT}` | {whole:.1f} |")
    print(f"| **outside of the stages** | **{whole - sum(bare.values()):.1f}** |")
    again = ", ".join(f"{seconds(root, 'dod', 'run', EXPERIMENT):.1f}" for _ in range(3))
    print(f"\n| command | seconds |\n|---|---:|\n| `dod run {EXPERIMENT}`, nothing to do | {again} |")
    repro = seconds(root, "dvc", "repro", f"report@{EXPERIMENT}")
    print(f"| `dvc repro report@{EXPERIMENT}`, nothing to do | {repro:.1f} |")
    print(f"| `dagster dev` until its pages answer | {answer(root):.1f}, {answer(root):.1f} |")


if __name__ == "__main__":
    main()
