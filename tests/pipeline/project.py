"""A DVC project of tiny size: the repository's own source, small images, a small experiment, and commands run in it."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from PIL import Image

SOURCE = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COPIED = ("dod_models", "dod_pipeline", "dagster_home", "infra", "dvc.yaml", ".dvc", ".dvcignore", ".gitignore")

SIZE = 16  # pixels
PER_CLASS = 30  # images in each split: FID wants more images than the feature net's 64 features
SAMPLES = 70  # for the same reason
CLASSES = ("bar", "pole", "spot")

MODEL: dict[str, Any] = {
    "preset": "DoD-demo",
    "latent_size": 4,
    "num_classes": 3,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "lem": {"width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "num_tokens": 1, "token_width": 4},
}
TRAIN: dict[str, Any] = {
    "model": MODEL,
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.003,
    "warmup_steps": 3,
    "ema_decays": [0.9],
    "ema_warmup": True,
    "save_every": 2,
    "state_every": 2,
    "log_every": 1,
    "seed": 0,
}
SAMPLING = {"num_samples": SAMPLES, "solver": "euler", "num_steps": 2, "channels": "all", "ema_decay": 0.9, "seed": 0}
CHECKPOINT = {"experiment": "tiny", "data": "tiny", "step": 6}
STAGES = (
    *("dataset@tiny", "reference@tiny", "codec@tiny", "latents@tiny", "train@tiny"),
    *("stage1@tiny-6", "stage2@tiny-6", "metrics@tiny-6", "sweeps@tiny-6", "report@tiny"),
)


def params(images: Path) -> dict[str, Any]:
    """A params.yaml for the images in that folder; every call gives a fresh one."""
    size = {"image_size": SIZE, "channels": 1, "batch_size": 16}
    values = {
        "datasets": {
            "tiny": {
                "dataset": {"source": "folder", "root": str(images), "max_quarantined": 0.05},
                "reference": {**size, "epochs": 2, "max_shift": 1},
                "codec": {**size, "source": "train", "widths": [8, 8, 16], "groups": 4, "steps": 20},
                "latents": {"mirror": True, "shard_size": 40},
            }
        },
        "experiments": {
            "tiny": {
                "data": "tiny",
                "train": TRAIN,
                "sampling": SAMPLING,
                "stage1": {"guidance": 1.0},
                "stage2": {"guidance": 2.0, "null_branch": "label"},
                "evaluation": {"num_samples": SAMPLES},
            }
        },
        "checkpoints": {"tiny-6": CHECKPOINT},
        "sweeps": {"tiny-6": {**CHECKPOINT, "rows": [{"stage": 2, "guidance": 1.0}]}},
    }
    return copy.deepcopy(values)


def write_images(root: Path) -> Path:
    """Noisy bars, poles and spots in ImageNet's folder layout."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in CLASSES:
            (root / split / kind).mkdir(parents=True)
            for index in range(PER_CLASS):
                pixels = rng.integers(0, 40, size=(SIZE, SIZE))
                a, b = rng.integers(2, SIZE - 6, size=2)
                pixels[
                    slice(a, a + 4) if kind != "pole" else slice(None),
                    slice(b, b + 4) if kind != "bar" else slice(None),
                ] += 200
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / kind / f"{index:03d}.png")
    return root


def environment(**changes: str) -> dict[str, str]:
    """Commands of this environment first on PATH, one thread, an author for git; Dagster's folder is the project's.

    The shell is one that stays above the command that it is given: only `exec` in dvc.yaml takes it away.
    """
    quiet = {"OMP_NUM_THREADS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "COLUMNS": "200", "PYTHONWARNINGS": "default"}
    quiet["SHELL"] = "/bin/sh"
    who = {f"GIT_{role}_{what}": "tiny@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    found = {name: value for name, value in os.environ.items() if not name.startswith("DAGSTER_")}
    return found | quiet | who | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | changes


class Project:
    """A folder that is a git repository and a DVC project; methods run commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, *command: str, log: IO[str] | None = None, **env: str) -> subprocess.Popen[str]:
        """Start a command without waiting for it; it writes into pipes, or into `log`."""
        to = log or subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, env=environment(**env), stdout=to, stderr=to, text=True)

    def run(self, *command: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; AssertionError with its output unless it exits with `status`."""
        done = subprocess.run(
            command, cwd=self.root, env=environment(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == status, (
            f"{command} -> {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        )
        return done

    def dod(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("dod", *arguments, status=status)

    def dvc(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", *arguments, status=status)

    def commit(self, message: str = "state") -> None:
        """Commit everything that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)

    def write_params(self, values: dict[str, Any]) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def params(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return found

    def lock(self) -> dict[str, Any]:
        """The stages of dvc.lock, by address."""
        found: dict[str, Any] = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        return found

    def outs(self) -> dict[str, str]:
        """md5 of every output of every stage, by path."""
        return {out["path"]: out["md5"] for stage in self.lock().values() for out in stage["outs"]}

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file that a user sees."""
        hidden = {".git", ".dvc", "__pycache__"}
        found = [p for p in sorted(self.root.rglob("*")) if p.is_file() and not hidden & set(p.parts)]
        return {p.relative_to(self.root).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}

    def clone(self, root: Path) -> "Project":
        """`git clone` of what was committed; a sibling, so that both know the same DVC remote."""
        self.run("git", "clone", "--quiet", str(self.root), str(root))
        return Project(root)

    def copy(self, root: Path) -> "Project":
        """A copy with everything, the cache included."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)


def create(root: Path, values: dict[str, Any]) -> Project:
    """A new project with the repository's present source, committed or not, and these params."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *COPIED],
        cwd=SOURCE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (SOURCE / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, root / name)
    project = Project(root)
    project.write_params(values)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.commit("start")
    return project
