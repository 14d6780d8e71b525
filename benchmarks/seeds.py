"""`make demo-seeds`: the demo under three training and sampling seeds, with guidance sweeps.

The study runs in a clone of its own below `.state/`, so that the demo's graph stays small. It shares the demo's DVC
cache: what the demo has made is not made again.
"""

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CLONE = ROOT / ".state" / "seeds"
SEEDS = (0, 1, 2)
# 15 guided steps of stage 1 take 30 evaluations of the network, as 10 steps and then 10 guided steps of two stages do.
ROWS = [
    {"stage": 1, "guidance": 1.0, "num_steps": 30},
    {"stage": 1, "guidance": 1.5, "num_steps": 15},
    {"stage": 1, "guidance": 2.0, "num_steps": 15},
    {"stage": 1, "guidance": 2.5, "num_steps": 15},
    {"stage": 2, "guidance": 1.0},
    {"stage": 2, "guidance": 1.5},
    {"stage": 2, "guidance": 2.5},
    {"stage": 2, "guidance": 2.0, "null_branch": "both"},
]


def call(*command: str, cwd: Path = ROOT) -> str:
    """Run a command; a failure is shown and ends the study."""
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def clone() -> None:
    """Bring the clone to this folder's commit."""
    if call("git", "status", "--porcelain", "--", "dod_models", "dod_pipeline", "dvc.yaml", "params.yaml"):
        sys.exit("demo-seeds: code or settings differ from the last commit, on which the study runs; commit them first")
    if not CLONE.exists():
        call("git", "clone", "--quiet", "--no-local", str(ROOT), str(CLONE))
    call("git", "fetch", "--quiet", str(ROOT), "HEAD", cwd=CLONE)
    call("git", "reset", "--quiet", "--hard", "FETCH_HEAD", cwd=CLONE)
    call(str(ROOT / ".venv/bin/dvc"), "cache", "dir", "--local", str(ROOT / ".dvc" / "cache"), cwd=CLONE)


def write_params() -> list[str]:
    """Give the clone an experiment for each seed, and a sweep of each one's checkpoint; returns the experiments."""
    params = yaml.safe_load((CLONE / "params.yaml").read_text())
    base, checkpoint = params["experiments"]["mnist"], params["checkpoints"]["mnist-1500"]
    for seed in SEEDS:
        name = f"mnist-seed{seed}" if seed else "mnist"
        seeded = {"train": base["train"] | {"seed": seed}, "sampling": base["sampling"] | {"seed": seed}}
        params["experiments"][name] = base | seeded
        params["checkpoints"][f"{name}-1500"] = checkpoint | {"experiment": name}
        params["sweeps"][f"{name}-1500"] = checkpoint | {"experiment": name, "rows": ROWS}
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    (CLONE / "params.yaml").write_text(yaml.dump(params, Dumper=dumper, sort_keys=False))
    return [name for name in params["experiments"] if name.startswith("mnist")]


if __name__ == "__main__":
    clone()
    experiments = write_params()
    os.chdir(CLONE)
    os.execv(ROOT / ".venv/bin/dod", ["dod", "run", *experiments])
