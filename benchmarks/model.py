"""`make bench-model`: DoD-B against naive versions of itself and against its peers, side by side in one run.

Times are medians of paired runs (ours, then the other, on the same inputs), in seconds; `ratio` is the median of the
pairs' ratios. `arithmetic` is the ratio of the multiply-adds (MODEL.md), which a perfect implementation of both would
reach. Training steps are forward and backward; what the optimizer adds is a row of its own, being the same whatever the
batch. Writes latest.json beside this file.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import peers
from dod_models import artifact, data
from dod_models.ema import Ema
from dod_models.flow import flow_loss
from dod_models.model import DoD, ModelConfig
from dod_models.packed import packed_weights
from dod_models.sample import GuidedVelocity, SampleConfig

BATCH, KEEP = 4, [0, 2]  # p_s = 0.5: half of the batch keeps its prior
STEPS = 30  # Euler steps of each stage
SCALE = 5.5  # guidance of stage 2
WORKS = ["train_vs_naive", "train_vs_fitv2", "stage1_vs_fitv2", "stage2_vs_fitv2", "sample_vs_naive", "loader_vs_files"]
LATEST = Path(__file__).with_name("latest.json")
LATENTS, SHARD, LOADED = 8192, 1024, 256  # images on disk, in a shard, in a batch of the loader
NAIVE = "DoD-B, naively"
Call = Callable[[], object]
Model = TypeVar("Model", bound=nn.Module)


class Row(NamedTuple):
    """One line of the result; those of `WORKS` are written to latest.json."""

    work: str
    ours_s: float
    against_s: float
    ratio: float
    arithmetic: float | None


def seconds(call: Call) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def paired(work: str, ours: Call, against: Call, *, arithmetic: float | None, repeats: int) -> Row:
    """Medians of pairs, after one of each to warm up."""
    ours(), against()
    pairs = [(seconds(ours), seconds(against)) for _ in tqdm(range(repeats), desc=work, unit="pair")]
    return Row(work, *medians(pairs), arithmetic)


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Of ours, of the other, and of the ratios."""
    return (
        statistics.median(ours for ours, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(ours / other for ours, other in pairs),
    )


def config(depth: int = 12) -> ModelConfig:
    """DoD-B; FiTv2-B and SiT-B share its width and heads."""
    return ModelConfig.model_validate({"preset": "DoD-B", "depth": depth})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DoD-B": lambda: DoD(config()),
    NAIVE: lambda: peers.NaiveDoD(config()),
    "FiTv2-B/15": lambda: peers.FiTv2(config(15)),  # as deep as the paper's baseline
    "SiT-B/2": lambda: peers.SiT(config()),
}


def filled(model: Model) -> Model:
    """The model with random numbers where its initialization has zeros: no product is trivial."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=rng)
    return model


class Batch(NamedTuple):
    """One batch, the same for every model."""

    x: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    keep: Tensor

    @classmethod
    def make(cls) -> "Batch":
        rng = torch.Generator().manual_seed(1)
        x, noise = torch.randn(2, BATCH, *config().latent_shape, generator=rng)
        t, labels = torch.rand(BATCH, generator=rng), torch.randint(1000, (BATCH,), generator=rng)
        return cls(x, noise, t, labels, torch.tensor(KEEP))


def training(model: nn.Module, batch: Batch) -> Call:
    """Forward and backward of a training step."""
    extra = {"prior": batch.x, "keep": batch.keep} if isinstance(model, DoD) else {}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        flow_loss(model(batch.noise, batch.t, batch.labels, **extra), batch.x, batch.noise).backward()

    return step


def quiet(call: Call) -> Call:
    """Without gradients."""
    return torch.no_grad()(call)


def training_rows(model: DoD, batch: Batch, repeats: int) -> Iterator[Row]:
    """A training step against the naive one, FiTv2-B of 15 blocks and SiT-B/2; and the update that follows it."""
    ours = training(model, batch)
    naive, fitv2, sit = (training(filled(MODELS[name]()), batch) for name in (NAIVE, "FiTv2-B/15", "SiT-B/2"))
    yield paired("train_vs_naive", ours, naive, arithmetic=0.71, repeats=repeats)
    yield paired("train_vs_fitv2", ours, fitv2, arithmetic=1.34, repeats=repeats)
    yield paired("train_vs_sit", ours, sit, arithmetic=None, repeats=min(repeats, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    averages = [Ema(model, decay=decay, warm_up=False) for decay in (0.999, 0.9999)]

    def update() -> None:
        optimizer.step()
        for average in averages:
            average.update(model, 0)

    yield paired("update_vs_train", update, ours, arithmetic=None, repeats=min(repeats, 3))
    model.zero_grad(set_to_none=True)


def step_rows(model: DoD, batch: Batch, repeats: int) -> Iterator[Row]:
    """A step of stage 1, and a guided one of stage 2, against the same FiTv2-B."""
    fitv2, args = filled(MODELS["FiTv2-B/15"]()), (batch.x, batch.t, batch.labels)
    one, two = quiet(lambda: fitv2(*args)), quiet(lambda: (fitv2(*args), fitv2(*args)))
    ours = quiet(lambda: model.velocity(*args))
    yield paired("stage1_unpacked", ours, one, arithmetic=0.80, repeats=repeats)
    with packed_weights(model), torch.no_grad():  # as sampling has them
        yield paired("stage1_vs_fitv2", ours, one, arithmetic=0.80, repeats=2 * repeats)
        guided = GuidedVelocity(model, batch.labels, model.embed_sample(batch.x), SampleConfig(guidance=SCALE))
        ours = quiet(lambda: guided(batch.x, batch.t))
        yield paired("stage2_vs_fitv2", ours, two, arithmetic=0.88, repeats=repeats)


def euler(start: Tensor, velocity: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """States after each of `STEPS` steps."""
    x = start
    for step in range(STEPS):
        x = x + velocity(x, torch.full((len(x),), step / STEPS)) / STEPS
        yield x


def two_stages(model: DoD, batch: Batch) -> Iterator[Tensor]:
    """Our sampling: the LEM once, one condition per sample where S stands."""
    previous = batch.noise
    for state in euler(previous, GuidedVelocity(model, batch.labels, None, SampleConfig(guidance=1.0))):
        yield (previous := state)
    prior = model.embed_sample(previous)
    yield from euler(batch.x, GuidedVelocity(model, batch.labels, prior, SampleConfig(guidance=SCALE)))


def two_naive_stages(model: peers.NaiveDoD, batch: Batch) -> Iterator[Tensor]:
    """The same samples, naively."""
    previous = batch.noise
    for state in euler(previous, partial(model.first_stage, labels=batch.labels)):
        yield (previous := state)
    yield from euler(batch.x, partial(model.guided, labels=batch.labels, previous=previous, scale=SCALE))


@torch.no_grad()
def sampling_row(model: DoD, batch: Batch) -> Row:
    """Both stages once; the two take turns step by step, so that a busy machine slows both alike."""
    other = peers.NaiveDoD(model.config)
    other.load_state_dict(model.state_dict())
    ours, naive, spent = two_stages(model, batch), two_naive_stages(other, batch), [0.0, 0.0]
    with packed_weights(model):
        for _ in tqdm(range(2 * STEPS), desc="sample_vs_naive", unit="step"):
            ends = []
            for place, steps in enumerate((ours, naive)):
                begun = time.perf_counter()
                ends.append(next(steps))
                spent[place] += time.perf_counter() - begun
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3)
    return Row("sample_vs_naive", spent[0], spent[1], spent[0] / spent[1], 0.55)


def loader_row(repeats: int) -> Row:
    """Random batches of moments from our shards, and from a file per image; everything is in the page cache."""
    shape, rng = (4, 32, 32), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with artifact.writing(folder / "shards", schema=data.SCHEMA, config="") as out:
            for index, first in enumerate(range(0, LATENTS, SHARD)):
                moments = rng.standard_normal((SHARD, 2, 2, *shape), dtype=np.float32).astype(np.float16)
                np.save(out.path / data.shard_name(index), moments)
                for row in range(SHARD):
                    save_file({"moments": torch.from_numpy(moments[row])}, folder / f"{first + row}.safetensors")
            np.save(out.path / "labels.npy", np.zeros(LATENTS, dtype=np.int64))
            out.about = {"count": LATENTS, "classes": 1, "views": 2, "latent_shape": shape, "shard_size": SHARD}
        shards = data.LatentShards(folder / "shards")
        found = []
        for _ in tqdm(range(10 * repeats), desc="loader_vs_files", unit="pair"):
            indices, views = (rng.integers(n, size=LOADED).tolist() for n in (LATENTS, 2))
            rows = list(zip(indices, views, strict=True))

            def ours(indices: list[int] = indices, views: list[int] = views) -> Tensor:
                return torch.from_numpy(shards.gather(indices, views))

            def files(rows: list[tuple[int, int]] = rows) -> Tensor:
                return torch.stack([load_file(folder / f"{i}.safetensors")["moments"][view] for i, view in rows])

            assert torch.equal(ours(), files())
            found.append((seconds(ours), seconds(files)))
    return Row("loader_vs_files", *medians(found), None)


def peak_mib(name: str) -> float:
    """MiB by which a training step of that model raises the peak of a fresh process, weights and gradients included."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.model", "--memory", name], capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"--memory {name}: {done.stderr}")
    return float(done.stdout)


def most_mib() -> float:
    """The most memory that this process has held (Linux; getrusage would count its parent's)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def print_peak(name: str) -> None:
    """What `peak_mib` reads."""
    before = most_mib()
    training(filled(MODELS[name]()), Batch.make())()
    print(most_mib() - before)


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title=f"batch {BATCH}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("work", "ours s", "against s", "ratio", "arithmetic"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        ideal = "-" if row.arithmetic is None else f"{row.arithmetic:.2f}"
        table.add_row(row.work, f"{row.ours_s:.5g}", f"{row.against_s:.5g}", f"{row.ratio:.3f}", ideal)
    Console(width=100).print(table)


def main() -> None:
    """Measure everything, or one model's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each work")
    parser.add_argument("--memory", choices=list(MODELS), help="print one model's peak instead")
    given = parser.parse_args()
    if given.memory is not None:
        print_peak(given.memory)
        return
    model, batch = filled(MODELS["DoD-B"]()), Batch.make()
    assert isinstance(model, DoD)
    rows = [loader_row(given.repeats), *step_rows(model, batch, given.repeats)]
    rows += [*training_rows(model, batch, given.repeats), sampling_row(model, batch)]
    show(rows)
    for name in MODELS:
        print(f"peak memory of a training step, {name}: {peak_mib(name):.0f} MiB")
    found = {row.work: row._asdict() for row in rows}
    artifact.write_json(LATEST, [found[work] for work in WORKS])
    print(f"wrote {LATEST}")


if __name__ == "__main__":
    main()
