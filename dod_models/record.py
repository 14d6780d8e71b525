"""What training notes down: the curve, and the ledger of the samples that it has seen.

Numbers wait on the device until a row is due, so that no step waits for them. Rows that have begun ride in the resume
state, and nothing is noted twice.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dod_models.compute import Processes
from dod_models.data import TrainingDraws, image_indices

CURVE, LEDGER = "curve.jsonl", "ledger.jsonl"
Row = dict[str, int | float | str]


class Record:
    """Rows of two tables, for the steps since the row before.

    The curve: step, samples seen, mean loss, mean norm of the gradient. The ledger: step, first sample, the one after
    the last, and sha256 of the image indices that all processes drew for them.
    """

    def __init__(self, *, log_every: int, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.curve: list[Row] = []
        self.ledger: list[Row] = []
        self.numbers = torch.zeros(0, 2)  # loss and norm of the steps since the last row, of all processes
        self.images = torch.zeros(0, batch_size, dtype=torch.long)
        self.waiting = torch.zeros(log_every, 2, device=device)  # those not yet collected, of this process
        self.drawn: list[np.ndarray] = []

    def add(self, draw: TrainingDraws, loss: Tensor, norm: Tensor) -> None:
        """Note a step, without waiting for its numbers."""
        self.waiting[len(self.drawn)] = torch.stack([loss, norm])
        self.drawn.append(draw.images)

    def collect(self, processes: Processes) -> None:
        """Join what the processes have noted; FloatingPointError names the first step that is not finite."""
        if not self.drawn:
            return
        numbers = processes.gather(self.waiting[: len(self.drawn)].cpu()).mean(0)
        images = processes.gather(torch.from_numpy(np.stack(self.drawn)))  # processes, steps, share of the batch
        self.numbers = torch.cat([self.numbers, numbers])
        self.images = torch.cat([self.images, images.transpose(0, 1).flatten(1)])
        self.drawn.clear()
        self.check_finite()

    @property
    def begun(self) -> int:
        """Steps in the rows so far."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def check_finite(self) -> None:
        """FloatingPointError that says what to do."""
        bad = (~self.numbers.isfinite()).any(dim=1).nonzero()
        if not len(bad):
            return
        place = int(bad[0])
        step, (loss, norm) = self.begun + place, self.numbers[place].tolist()
        raise FloatingPointError(
            f"train: the loss is {loss} and its gradient's norm {norm} at step {step + 1}, samples "
            f"{step * self.batch_size} to {(step + 1) * self.batch_size - 1}; nothing was saved since. Lower "
            "train.learning_rate, or raise train.warmup_steps. If the same step fails again, look at its images, by "
            f"their places in the latents: {self.images[place].tolist()}"
        )

    def close_row(self) -> Row:
        """Make a row of what was collected."""
        steps = len(self.numbers)
        first, step = self.begun * self.batch_size, self.begun + steps
        # one by one in float32: a sum in another order would differ in its last bit
        loss, norm = (float(sum(column)) / steps for column in self.numbers.T)
        self.curve.append({"step": step, "samples": step * self.batch_size, "loss": loss, "gradient_norm": norm})
        self.ledger.append(
            {"step": step, "first": first, "stop": step * self.batch_size, "images": digest(self.images.numpy())}
        )
        self.numbers, self.images = self.numbers[:0], self.images[:0]
        return self.curve[-1]

    def tensors(self) -> dict[str, Tensor]:
        """The row that has begun, for a resume state."""
        return {"row/numbers": self.numbers.clone(), "row/images": self.images.clone()}

    def restore(self, rows: dict[str, list[Row]], tensors: dict[str, Tensor]) -> None:
        """Go on from a resume state's rows and `tensors`."""
        self.curve, self.ledger = rows["curve"], rows["ledger"]
        self.numbers, self.images = tensors["row/numbers"], tensors["row/images"]

    def write(self, folder: Path) -> None:
        """Both files, a row on each line."""
        for name, rows in ((CURVE, self.curve), (LEDGER, self.ledger)):
            (folder / name).write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def digest(images: np.ndarray) -> str:
    """sha256 of image indices as little-endian int64, in the order of the samples."""
    return hashlib.sha256(images.astype("<i8").tobytes()).hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The rows of either file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(rows: list[Row], *, samples: int, seed: int, size: int) -> None:
    """ValueError unless the rows join from sample 0 to `samples` without a gap or a repeat, and hold the images that
    the order under `seed` of a data set of `size` images gives them."""
    reached = 0
    for row in rows:
        first, stop = int(row["first"]), int(row["stop"])
        if first != reached:
            kind = "a gap" if first > reached else "a repeat"
            raise ValueError(f"{LEDGER}: step {row['step']}: begins with sample {first} after {reached}: {kind}")
        if row["images"] != digest(image_indices(range(first, stop), seed=seed, size=size)):
            raise ValueError(f"{LEDGER}: step {row['step']}: samples {first} to {stop - 1} were other images")
        reached = stop
    if reached != samples:
        raise ValueError(f"{LEDGER}: ends with sample {reached}, expected {samples}")
