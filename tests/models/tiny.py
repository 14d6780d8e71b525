"""Real things of tiny size: images, models with random weights, and the whole pipeline through the command line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import torch
from PIL import Image

from dod_models import artifact, cli, codec, devkit, layout
from dod_models.config import Frozen
from dod_models.model import DoD, ModelConfig

SIZE = 16  # pixels
PER_CLASS = 30  # images in each split: the feature net's 64 features want more than 64 images
CLASSES = ("bar", "pole", "spot")

MODEL: dict[str, Any] = {
    "latent_size": 4,
    "num_classes": 3,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "lem": {"width": 20, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "num_tokens": 1, "token_width": 4},
}
TRAIN: dict[str, Any] = {
    "model": MODEL,
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 3,
    "ema_decays": [0.5, 0.9],
    "ema_warmup": True,
    "save_every": 4,
    "state_every": 2,
    "log_every": 2,
}
SAMPLING: dict[str, Any] = {"num_samples": 70, "solver": "euler", "num_steps": 2, "ema_decay": 0.9, "batch_size": 32}
GUIDED: dict[str, Any] = {**SAMPLING, "guidance": 2.0}


class Pipeline(NamedTuple):
    """Where the stages' outputs lie, and the facts that they returned."""

    root: Path
    facts: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.root / "train" / "step-8"

    def __getattr__(self, name: str) -> Path:
        return self.root / name  # dataset, reference, codec, latents, train, stage1, stage2


def config(**changes: Any) -> ModelConfig:
    """A tiny model's config."""
    return ModelConfig.model_validate({**MODEL, **changes})


def random_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> DoD:
    """A DoD with every weight and bias random: at its own initialization most of the network is multiplied by zero."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the frozen positions too are computed at this precision
    try:
        model = DoD(config)
    finally:
        torch.set_default_dtype(before)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5
            p.copy_(scale * torch.randn(p.shape, generator=rng, dtype=dtype))
    model.time_embed.float()  # its sinusoid is always in float32
    return model


def draw(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A noisy grey picture of its class: a horizontal bar, a vertical one, or a square."""
    pixels = rng.integers(0, 40, size=(SIZE, SIZE))
    a, b = rng.integers(2, SIZE - 6, size=2)
    rows = slice(a, a + 4) if kind != "pole" else slice(None)
    columns = slice(b, b + 4) if kind != "bar" else slice(None)
    pixels[rows, columns] += 200
    return pixels.astype(np.uint8)


def write_images(root: Path, *, per_class: int = PER_CLASS, seed: int = 0) -> Path:
    """An image folder in ImageNet's layout."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for index in range(per_class):
                Image.fromarray(draw(kind, rng)).save(folder / f"{index:03d}.png")
    return root


def pack(files: Path, archive: Path) -> Path:
    """An archive of the files in a folder, in no order."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        for path in sorted(files.iterdir(), reverse=True):
            tar.add(path, path.name)
    return archive


def pack_images(images: Path, root: Path) -> Path:
    """The same data set with an archive for each class."""
    for folder in images.glob("*/*"):
        pack(folder, root / folder.parent.name / f"{folder.name}.tar")
    return root


def pack_officially(images: Path, root: Path) -> Path:
    """The same data set in the three files that ImageNet comes in."""
    for folder in (images / "train").iterdir():
        pack(folder, root / "classes" / f"{folder.name}.tar")
    pack(root / "classes", root / layout.TRAIN)
    shutil.rmtree(root / "classes")
    names = sorted((path.name, path) for path in (images / "val").glob("*/*"))
    with tarfile.open(root / layout.VAL, "w") as tar:
        for number, (_, path) in enumerate(names):
            tar.add(path, f"ILSVRC2012_val_{number:08}.{path.suffix.lstrip('.').upper()}")
    numbers = {name: 7 + place for place, name in enumerate(reversed(CLASSES))}  # the kit's order is its own
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(number, name, f"a {name}") for name, number in numbers.items()], dtype=fields)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{numbers[path.parent.name]}\n" for _, path in names).encode()
    with tarfile.open(root / layout.KIT, "w:gz") as tar:
        for name, data in ((devkit.SYNSETS, meta.getvalue()), (devkit.TRUTH, truth)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {p.relative_to(folder).as_posix(): artifact.sha256_file(p) for p in folder.rglob("*") if p.is_file()}


# `python -m dod_models.cli` in a process that kills itself with SIGKILL when it comes to rename a certain file.
KILLED = """
import os, signal, sys
name, batch, *arguments = sys.argv[1:]
def die(event, details):
    if event == "os.rename" and str(details[0]).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
from dod_models import cli, codec
codec.BATCH = int(batch)
sys.addaudithook(die)
sys.exit(cli.main(arguments))
"""


def kill(moment: str, name: str, config: Frozen, out: Path, *, threads: int = 1, **paths: Path) -> None:
    """Run a stage as the command line does, killed when it comes to rename a file whose name ends so."""
    words = [text for key, path in (paths | {"out": out}).items() for text in (f"--{key}", str(path))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(codec.BATCH), name, "--config", config.canonical(), *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()


def stage(name: str, config: dict[str, Any], out: Path, facts: Path, **inputs: Path) -> Any:
    """Run a stage as the command line does, and return its facts."""
    paths = [text for key, path in inputs.items() for text in (f"--{key}", str(path))]
    status = cli.main([name, "--config", json.dumps(config), "--out", str(out), "--facts", str(facts), *paths])
    assert status == 0, f"stage {name} failed"
    return json.loads(facts.read_text())


def pipeline(root: Path) -> Pipeline:
    """Run every stage below `root`, unless that was done."""
    summary = root / "facts.json"
    if summary.exists():
        return Pipeline(root, json.loads(summary.read_text()))
    shutil.rmtree(root, ignore_errors=True)  # what a failed attempt left
    images = write_images(root / "images")
    size = {"image_size": SIZE, "channels": 1}
    data = {"dataset": root / "dataset"}
    measured = {"reference": root / "reference", "codec": root / "codec"}
    model = {"checkpoint": root / "train" / "step-8", "codec": root / "codec"}
    stages = {"checkpoint": model["checkpoint"], "stage1": root / "stage1", "stage2": root / "stage2"}
    plan: list[tuple[str, dict[str, Any], dict[str, Path]]] = [
        ("dataset", {"root": str(images)}, {}),
        ("reference", {**size, "epochs": 8, "batch_size": 16, "max_shift": 1}, data),
        (
            "codec",
            {**size, "widths": [8, 8, 16], "groups": 4, "steps": 60, "batch_size": 16},
            data | {"reference": root / "reference"},
        ),
        ("latents", {"shard_size": 40}, data | {"codec": root / "codec", "state": root / "latents-state"}),
        ("train", TRAIN, {"latents": root / "latents", "state": root / "state"}),
        ("stage1", SAMPLING, model | {"state": root / "stage1-state"}),
        ("stage2", GUIDED, model | {"previous": root / "stage1", "state": root / "stage2-state"}),
        ("metrics", {"num_samples": 70}, {**measured, **stages, "state": root / "metrics-state"}),
    ]
    facts = {}
    for name, values, inputs in plan:
        facts[name] = stage(name, values, root / name, root / f"{name}-facts.json", **inputs)
    artifact.write_json(summary, facts)
    return Pipeline(root, facts)
