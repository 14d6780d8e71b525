"""Stage `train`: fit a DoD to latents by flow matching (section 3.3), with resumption exact to the bit.

The state of training is a pure function of the config and the number of samples seen: data order, noise, times and
drops come from `data.TrainingDraws`. The global batch is split over processes in contiguous blocks.
"""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dod_models import artifact
from dod_models.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from dod_models.checkpoint import load_state, save_checkpoint, save_state
from dod_models.compute import Processes, accelerator_for, synchronizing
from dod_models.config import STOPPED
from dod_models.data import LatentShards, TrainingDraws, draws_ahead
from dod_models.flow import flow_loss, logit_normal, point_on_path
from dod_models.record import Record, Row, check_ledger
from dod_models.speed import Speed, training_flops
from dod_models.state import TrainConfig, TrainState

__all__ = ["TrainConfig", "fit"]

log = logging.getLogger(__name__)

SCHEMA = "train/2"
STOPS = (signal.SIGTERM, signal.SIGINT)


def train_step(state: TrainState, draw: TrainingDraws) -> tuple[Tensor, Tensor]:
    """One update on this process's share of a batch; its mean loss and the gradient's norm, still on the device."""
    state.optimizer.zero_grad()
    total = torch.zeros((), device=state.accelerator.device)
    parts = draw.parts(state.config.compute.micro_batch)
    for number, part in enumerate(parts, 1):
        data, noise, normal, labels, keep = part.to(state.accelerator.device)
        t = logit_normal(normal)
        with synchronizing(state.model, state.accelerator, last=number == len(parts)):
            with state.accelerator.autocast():
                predicted = state.model(point_on_path(data, noise, t), t, labels, prior=data, keep=keep)
            loss = flow_loss(predicted.float(), data, noise) * (len(data) / len(draw))  # they add up to the mean
            state.accelerator.backward(loss)
        total += loss.detach()
    return total, state.update()


def draw_share(step: int, *, config: TrainConfig, shards: LatentShards, rank: int, processes: int) -> TrainingDraws:
    """The draws of one of the processes for a step: its contiguous block of the batch."""
    share = config.batch_size // processes
    first = step * config.batch_size + rank * share
    return TrainingDraws(
        shards,
        range(first, first + share),
        seed=config.seed,
        label_drop=config.label_drop,
        prior_drop=config.prior_drop,
        exact_share=config.prior_share == "exact",
    )


def check_shapes(config: TrainConfig, shards: LatentShards, processes: int) -> None:
    """ValueError where model, latents and processes do not fit each other."""
    model = config.model
    if shards.shape != model.latent_shape:
        raise ValueError(f"latents are {shards.shape}, model.channels and model.latent_size say {model.latent_shape}")
    if shards.num_classes != model.num_classes:
        raise ValueError(f"latents have {shards.num_classes} classes, model.num_classes is {model.num_classes}")
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {processes} processes")


class Work(NamedTuple):
    """Where work in progress lies, and what its manifests state."""

    out: Path  # becomes the output
    resume: Path  # the resume states
    about: dict[str, Any]


def fit(config: TrainConfig, *, latents: Path, out: Path, state: Path) -> Row:
    """Train to `config.steps`; `out` gets `step-N/` checkpoints, curve and ledger. Returns the curve's last row.

    Work in progress lies under `state`, keyed by config and latents: a run that was killed goes on from there, and its
    results equal those of an undisturbed run to the bit (on a CPU). SIGTERM or Ctrl-C ends the step, saves, and exits
    with status 143. Finished work stays there, as hard links, until the next training under `state` begins or
    `artifact.forget_finished` is called: nobody has recorded `out` yet. The first process alone reads and writes there.
    """
    accelerator = accelerator_for(config.precision)
    processes = Processes(accelerator)
    shards = LatentShards(latents, check=accelerator.is_local_main_process)
    check_shapes(config, shards, processes.count)
    processes.check_equal({"the config's digest": config.digest, "the latents' digest": shards.digest})
    key = f"{config.digest[:16]}-{shards.digest[:16]}"
    about = {"latents": shards.digest, "steps": config.steps, "seed": config.seed}
    work = Work(state / key / "out", state / key / "resume", about)
    with artifact.locked(work.out) if processes.first else nullcontext(), heeding_stops() as notice:
        if processes.first:
            artifact.forget_finished(state, but=key)
        training = TrainState(config, accelerator)
        record = Record(log_every=config.log_every, batch_size=config.batch_size, device=accelerator.device)
        go_on(training, record, processes, work)
        run(training, shards, record, processes, work, stop=notice.is_set)
        if processes.first:
            record.write(work.out)
            check_ledger(record.ledger, samples=config.steps * config.batch_size, seed=config.seed, size=len(shards))
            artifact.describe(work.out, schema=SCHEMA, config=config.digest, about=about)
            artifact.publish(work.out, out)
    processes.end()
    return record.curve[-1]


@contextmanager
def heeding_stops() -> Iterator[threading.Event]:
    """SIGTERM (a spot instance will be taken away) or Ctrl-C sets the event, and ends nothing by itself."""
    notice = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # others can't receive signals
        yield notice
        return
    before = {number: signal.signal(number, lambda *_: notice.set()) for number in STOPS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def go_on(training: TrainState, record: Record, processes: Processes, work: Work) -> None:
    """Restore the newest resume state whose checkpoints are all there; begin anew if there is none."""
    tensors, about = (find_state(work, training.config.save_every) if processes.first else None) or ({}, None)
    about = processes.told(about)
    if about is None:
        training.warm_start()
        log.info("train: beginning")
        return
    row = {name: tensors.pop(name) for name in record.tensors() if name in tensors}
    training.restore(tensors, about["step"])
    record.restore(about, processes.told(row))
    log.info(f"train: going on from step {about['step']}")


def find_state(work: Work, save_every: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest resume state whose checkpoints are all there, if any."""
    found = load_state(work.resume)
    if found is None:
        return None
    step = found[1]["step"]
    for saved in range(save_every, step + 1, save_every):
        try:
            artifact.verify(work.out / f"step-{saved}", schema=CHECKPOINT_SCHEMA)
        except artifact.DamagedError as error:
            log.warning(f"train: starting again, for the state of step {step} lacks a checkpoint: {error}")
            shutil.rmtree(work.resume)  # or its states, newer by number, would crowd out those to come
            return None
    return found


def run(
    training: TrainState,
    shards: LatentShards,
    record: Record,
    processes: Processes,
    work: Work,
    *,
    stop: Callable[[], bool],
) -> None:
    """The dull loop: steps, rows of the curve, checkpoints, resume states."""
    config, batch = training.config, training.config.batch_size
    speed = Speed(
        training.accelerator,
        flops_per_image=training_flops(config.model, prior_drop=config.prior_drop),
        peak_tflops=config.compute.peak_tflops,
    )
    draw = partial(draw_share, config=config, shards=shards, rank=processes.rank, processes=processes.count)
    bar = tqdm(
        total=config.steps * batch,
        initial=training.step * batch,
        desc="train",
        unit="image",
        disable=not processes.first,
    )
    with closing(draws_ahead(draw, range(training.step, config.steps))) as ahead, bar:
        speed.start(training.step * batch)
        for drawn in ahead:
            with naming_the_remedy():
                record.add(drawn, *train_step(training, drawn))
            bar.update(batch)
            row_is_due, stopping = training.step % config.log_every == 0, processes.any(stop())
            if not (row_is_due or stopping):
                continue
            record.collect(processes)
            if row_is_due:
                tell(record.close_row(), speed, bar)
            save(training, record, work, stopping=stopping)
            # The first one writes. If another ended meanwhile, torchrun would kill the first after 30 seconds; if it
            # began a step, NCCL would give up on the first after 10 minutes.
            processes.wait()
            if stopping and training.step < config.steps:
                log.info(f"train: stopped after step {training.step}, which was saved; run it again to go on")
                raise SystemExit(STOPPED)
            speed.start(training.step * batch)


@contextmanager
def naming_the_remedy() -> Iterator[None]:
    """ValueError that says what to set where a GPU's memory doesn't do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"train: {str(error).splitlines()[0]} Set experiments.KEY.compute in params.yaml: a smaller micro_batch, "
            "checkpointing: true, or sharding: fsdp for several GPUs"
        ) from None


def tell(row: Row, speed: Speed, bar: "tqdm[Any]") -> None:
    """Show a row, and how fast it came, in the progress bar and in the log."""
    shown = {"loss": f"{row['loss']:.4f}", "norm": f"{row['gradient_norm']:.3f}", **speed.read(int(row["samples"]))}
    bar.set_postfix({"step": row["step"]} | {name: value for name, value in shown.items() if name != "images/s"})
    if not bar.disable:
        log.info(f"train: step {row['step']}: {', '.join(f'{name} {value}' for name, value in shown.items())}")


def save(training: TrainState, record: Record, work: Work, *, stopping: bool) -> None:
    """Write the checkpoint and the resume state that are due at this step, in this order."""
    config, step, first = training.config, training.step, training.accelerator.is_main_process
    if step % config.save_every == 0:
        weights = training.weights()
        if first:
            save_checkpoint(work.out / f"step-{step}", weights, config.model, about={**work.about, "step": step})
    if stopping or step % config.state_every == 0 or step == config.steps:
        tensors = training.tensors() | record.tensors()
        if first:
            rows = {"curve": record.curve, "ledger": record.ledger}
            save_state(work.resume, step, tensors, config=config.digest, about=rows)
