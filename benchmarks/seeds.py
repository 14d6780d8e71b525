"""`make demo-seeds`: the demo under three training and sampling seeds, with guidance sweeps."""

import os
from pathlib import Path

from benchmarks import clone

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


def write_params(folder: Path) -> list[str]:
    """Give the clone an experiment for each seed, and a sweep of each one's checkpoint; returns the experiments."""
    params = clone.read_params(folder)
    base, checkpoint = params["experiments"]["mnist"], params["checkpoints"]["mnist-1500"]
    for seed in SEEDS:
        name = f"mnist-seed{seed}" if seed else "mnist"
        seeded = {"train": base["train"] | {"seed": seed}, "sampling": base["sampling"] | {"seed": seed}}
        params["experiments"][name] = base | seeded
        params["checkpoints"][f"{name}-1500"] = checkpoint | {"experiment": name}
        params["sweeps"][f"{name}-1500"] = checkpoint | {"experiment": name, "rows": ROWS}
    clone.write_params(folder, params)
    return [name for name in params["experiments"] if name.startswith("mnist")]


if __name__ == "__main__":
    folder = clone.at_this_commit("seeds")
    experiments = write_params(folder)
    os.chdir(folder)
    os.execv(clone.ROOT / ".venv/bin/dod", ["dod", "run", *experiments])
