"""Several processes, other layouts of the computation, and notices to stop: the samples and the results stay."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dod_models.record import read_rows

from . import tiny
from .forks import Child, Forks, arguments

# Rows, states and checkpoints of four steps; 12 images, so that blocks and micro-batches of unequal size come up.
CONFIG: dict[str, Any] = {**tiny.TRAIN, "batch_size": 12, "log_every": 4, "state_every": 4, "save_every": 4}


@pytest.fixture(scope="module")
def forks():
    found = Forks()
    yield found
    found.end()


class Training:
    """A training below a folder, by any number of processes, begun again as often as wanted."""

    def __init__(self, forks: Forks, latents: Path, root: Path, **changes: Any) -> None:
        self.forks, self.root, self.runs = forks, root, 0
        self.arguments = arguments({**CONFIG, **changes}, latents, root)
        root.mkdir(exist_ok=True)

    def start(self, size: int) -> list[Child]:
        self.runs += 1
        log = self.root / f"log-{self.runs}"
        return (
            self.forks.team(self.arguments, size=size, log=log)
            if size > 1
            else [self.forks.start(self.arguments, log=log)]
        )

    def finish(self, size: int) -> str:
        """Run to the end; returns what the first process printed."""
        team = self.start(size)
        for child in team:
            assert child.wait() == 0, child.text
        return team[0].text

    def interrupt(self, size: int, *, after: int, victim: int = 0, number: int = signal.SIGKILL) -> list[int]:
        """Send one process a signal once it trains and the state of a step is there; returns all exit statuses."""
        team = self.start(size)
        for child in team:
            assert child.until(lambda: "train: " in child.text), child.text  # noqa: B023
        assert team[0].until(lambda: bool(list(self.root.glob(f"state/*/resume/step-{after:09d}")))), team[0].text
        team[victim].kill(number)
        if number == signal.SIGKILL:  # as torchrun does
            for child in team:
                child.kill()
        return [child.wait() for child in team]

    @property
    def losses(self) -> list[float]:
        return [float(row["loss"]) for row in read_rows(self.root / "train" / "curve.jsonl")]

    @property
    def ledger(self) -> str:
        return (self.root / "train" / "ledger.jsonl").read_text()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / "train" / "step-8" / "ema-0.5.safetensors")


@pytest.fixture(scope="module")
def alone(forks, pipeline, tmp_path_factory):
    """An undisturbed training by one process."""
    found = Training(forks, pipeline.latents, tmp_path_factory.mktemp("alone"))
    found.finish(1)
    return found


def assert_agree(one: Training, other: Training) -> None:
    """The same samples; losses and weights equal to float tolerance."""
    assert one.ledger == other.ledger
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, weight in other.weights.items():
        torch.testing.assert_close(one.weights[name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "compute"),
    [
        (1, {"micro_batch": 5}),
        (2, {"micro_batch": 4, "checkpointing": True}),
        (2, {"sharding": "fsdp", "micro_batch": 1, "checkpointing": True}),
    ],
)
def test_the_layout_changes_no_sample_and_no_result(forks, pipeline, tmp_path, alone, size, compute):
    found = Training(forks, pipeline.latents, tmp_path, compute=compute)
    found.finish(size)
    assert_agree(found, alone)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(forks, pipeline, tmp_path, alone):
    found = Training(forks, pipeline.latents, tmp_path, compute={"compile": True, "checkpointing": True})
    found.finish(1)
    assert_agree(found, alone)


@pytest.mark.parametrize(("size", "sharding"), [(3, "ddp"), (2, "fsdp")])
def test_resuming_several_processes_is_exact_to_the_bit(forks, pipeline, tmp_path, alone, size, sharding):
    """Of three: a sum of two is the same in any order."""
    whole = Training(forks, pipeline.latents, tmp_path / "whole", compute={"sharding": sharding})
    whole.finish(size)
    assert_agree(whole, alone)
    cut = Training(forks, pipeline.latents, tmp_path / "cut", compute={"sharding": sharding})
    assert cut.interrupt(size, after=4) == [-signal.SIGKILL] * size
    assert "train: going on from step 4\n" in cut.finish(size)
    assert tiny.digests(cut.root / "train") == tiny.digests(whole.root / "train")


def test_other_processes_go_on_with_the_samples_that_follow(forks, pipeline, tmp_path, alone):
    """Two under FSDP, then three under DDP, then one."""
    found = Training(forks, pipeline.latents, tmp_path, compute={"sharding": "fsdp"})
    found.interrupt(2, after=4)
    found.arguments = arguments(CONFIG, pipeline.latents, tmp_path)
    statuses = found.interrupt(3, after=4, number=signal.SIGTERM)
    assert statuses == [143, 143, 143]
    assert "train: going on from step " in found.finish(1)
    assert_agree(found, alone)


def test_processes_stop_at_one_step_whichever_is_told(forks, pipeline, tmp_path):
    """In the middle of a row, which is neither lost nor doubled."""
    rows = {"log_every": 8, "state_every": 8, "save_every": 8}
    whole = Training(forks, pipeline.latents, tmp_path / "whole", **rows)
    whole.finish(2)
    cut = Training(forks, pipeline.latents, tmp_path / "cut", **rows)
    team = cut.start(2)
    assert team[1].until(lambda: "train: beginning" in team[1].text)
    team[1].kill(signal.SIGTERM)
    team[1].until(lambda: False)  # it has ended, which it may only after the first has saved
    assert list(cut.root.glob("state/*/resume/step-*")), team[0].text
    assert [child.wait() for child in team] == [143, 143], team[0].text
    assert "train: stopped after step " in team[0].text
    cut.finish(2)
    assert tiny.digests(cut.root / "train") == tiny.digests(whole.root / "train")
