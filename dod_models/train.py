"""Stage `train`: fit a DoD to latents by flow matching (section 3.3), with resumption exact to the bit.

The state of training is a pure function of the config and the number of samples seen: data order, noise, times and
drops come from `data.TrainingDraws`. The global batch is split over processes in contiguous blocks.
"""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from tqdm import tqdm

from dod_models import artifact, draws
from dod_models.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from dod_models.checkpoint import load_state, save_checkpoint, save_state
from dod_models.config import Frozen
from dod_models.data import LatentShards, TrainingDraws
from dod_models.ema import Ema
from dod_models.flow import flow_loss, logit_normal, point_on_path
from dod_models.model import DoD, ModelConfig

log = logging.getLogger(__name__)

SCHEMA = "train/1"
Decay = Annotated[float, Field(gt=0, lt=1)]
Curve = list[dict[str, int | float]]  # rows of step, samples seen, mean loss since the row before


class TrainConfig(Frozen):
    """The paper's training (section 4.1) by default; steps count optimizer updates."""

    model: ModelConfig
    steps: PositiveInt = 1_500_000
    batch_size: PositiveInt = 256  # over all processes
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: int = Field(0, ge=0)  # linear, then constant
    clip: PositiveFloat = 1.0  # norm of the gradient; stated nowhere in the paper
    ema_decays: tuple[Decay, ...] = Field((0.999, 0.9999), min_length=1)  # the paper prints 0.999, its peers use 0.9999
    ema_warmup: bool = False  # for short trainings
    label_drop: float = Field(0.1, ge=0, le=1)
    prior_drop: float = Field(0.5, ge=0, le=1)  # p_s
    prior_share: Literal["bernoulli", "exact"] = "bernoulli"  # exact: a fixed share of every batch keeps its prior
    precision: Literal["no", "bf16"] = "no"
    save_every: PositiveInt = 50_000  # steps between checkpoints
    state_every: PositiveInt = 5_000  # steps between resume states
    log_every: PositiveInt = 50  # steps averaged into a row of the curve
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def check_multiples(self) -> "TrainConfig":
        """Checkpoints and states fall on rows of the curve, the last checkpoint on the last step."""
        for name in ("save_every", "state_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of log_every {self.log_every}")
        if self.steps % self.save_every:
            raise ValueError(f"steps {self.steps} is not a multiple of save_every {self.save_every}")
        return self


class TrainState:
    """Model, optimizer and averages, and how many steps they have seen."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        with draws.seeded(config.seed, "model"):
            self.raw = DoD(config.model)
        self.config, self.accelerator, self.step = config, accelerator, 0
        self.raw.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            self.raw.parameters(), config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.model, self.optimizer = accelerator.prepare(self.raw, optimizer)
        self.averages = [Ema(self.raw, decay=d, warm_up=config.ema_warmup) for d in config.ema_decays]

    def update(self, loss: Tensor) -> None:
        """Backward pass, clipped AdamW step, averages."""
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        for average in self.averages:
            average.update(self.raw, self.step)
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        moments = self.optimizer.state_dict()["state"]
        found: dict[str, Tensor] = {f"model/{name}": p for name, p in self.raw.named_parameters()}
        for index, (name, _) in enumerate(self.raw.named_parameters()):
            found |= {f"optimizer/{name}/{key}": value for key, value in moments.get(index, {}).items()}
        for average in self.averages:
            found |= {f"ema-{average.decay}/{name}": w for name, w in average.weights.items()}
        return {name: t.detach().cpu().contiguous() for name, t in found.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """The inverse of `tensors`."""
        moments: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self.raw.named_parameters()):
            parameter.copy_(tensors[f"model/{name}"])
            prefix = f"optimizer/{name}/"
            moments[index] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for average in self.averages:
            for name, weight in average.weights.items():
                weight.copy_(tensors[f"ema-{average.decay}/{name}"])
        self.step = step


def train_step(state: TrainState, shards: LatentShards) -> Tensor:
    """One update on the next batch; returns its loss, still on the device."""
    config, rank, world = state.config, state.accelerator.process_index, state.accelerator.num_processes
    share = config.batch_size // world
    first = state.step * config.batch_size + rank * share
    draw = TrainingDraws(
        shards,
        range(first, first + share),
        seed=config.seed,
        label_drop=config.label_drop,
        prior_drop=config.prior_drop,
        exact_share=config.prior_share == "exact",
    )
    device = state.accelerator.device
    data, noise, labels, keep = (x.to(device) for x in (draw.latents, draw.noise, draw.labels, draw.keep))
    t = logit_normal(draw.normal.to(device))
    with state.accelerator.autocast():
        predicted = state.model(point_on_path(data, noise, t), t, labels, prior=data, keep=keep)
    loss = flow_loss(predicted.float(), data, noise)
    state.update(loss)
    return loss.detach()


def check_shapes(config: TrainConfig, shards: LatentShards, processes: int) -> None:
    """ValueError where model, latents and processes do not fit each other."""
    model = config.model
    if shards.shape != model.latent_shape:
        raise ValueError(f"latents are {shards.shape}, model.channels and model.latent_size say {model.latent_shape}")
    if shards.num_classes != model.num_classes:
        raise ValueError(f"latents have {shards.num_classes} classes, model.num_classes is {model.num_classes}")
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {processes} processes")


def fit(config: TrainConfig, *, latents: Path, out: Path, state: Path) -> dict[str, Any]:
    """Train to `config.steps`; `out` gets `step-N/` checkpoints and `curve.jsonl`. Returns the last row of the curve.

    Work in progress lies under `state`, keyed by config and latents: a run that was killed goes on from there, and its
    results equal those of an undisturbed run to the bit (on a CPU). Finished work stays there, as hard links, until the
    next training under `state` begins or `artifact.forget_finished` is called: nobody has recorded `out` yet.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    main = accelerator.is_main_process
    shards = LatentShards(latents, check=main)
    check_shapes(config, shards, accelerator.num_processes)
    key = f"{config.digest[:16]}-{shards.digest[:16]}"
    work, resume = state / key / "out", state / key / "resume"
    about = {"latents": shards.digest, "steps": config.steps, "seed": config.seed}
    with artifact.locked(work) if main else nullcontext():
        if main:
            artifact.forget_finished(state, but=key)
        training = TrainState(config, accelerator)
        curve = go_on(training, work, resume)
        run(training, shards, curve, work=work, resume=resume, about=about)
        if main:
            artifact.describe(work, schema=SCHEMA, config=config.digest, about=about)
            artifact.publish(work, out)
    return curve[-1]


def go_on(training: TrainState, work: Path, resume: Path) -> Curve:
    """Restore the newest resume state whose checkpoints are all there, if any; returns the rows of the curve so far."""
    found = load_state(resume)
    if found is None:
        return []
    every, step = training.config.save_every, found[1]["step"]
    for saved in range(every, step + 1, every):
        try:
            artifact.verify(work / f"step-{saved}", schema=CHECKPOINT_SCHEMA)
        except artifact.DamagedError as error:
            log.warning(f"train: starting again, for the state of step {step} lacks a checkpoint: {error}")
            if training.accelerator.is_main_process:
                shutil.rmtree(resume)  # or its states, newer by number, would crowd out those to come
            return []
    training.restore(found[0], step)
    log.info(f"train: going on from step {step}")
    curve: Curve = found[1]["curve"]
    return curve


def run(
    training: TrainState,
    shards: LatentShards,
    curve: Curve,
    *,
    work: Path,
    resume: Path,
    about: dict[str, Any],
) -> None:
    """The dull loop: steps, rows of the curve, checkpoints, resume states."""
    config, accelerator = training.config, training.accelerator
    bar = tqdm(
        total=config.steps * config.batch_size,
        initial=training.step * config.batch_size,
        desc="train",
        unit="image",
        disable=not accelerator.is_main_process,
    )
    total = torch.zeros((), device=accelerator.device)
    while training.step < config.steps:
        total += train_step(training, shards)
        bar.update(config.batch_size)
        if training.step % config.log_every:
            continue
        loss = float(accelerator.reduce(total, "mean")) / config.log_every
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"train: the loss is {loss} at step {training.step}; lower train.learning_rate, or delete "
                f"{resume.parent} if the resume state is at fault"
            )
        total.zero_()
        curve.append({"step": training.step, "samples": training.step * config.batch_size, "loss": loss})
        bar.set_postfix(step=training.step, loss=f"{loss:.4f}")
        save(training, curve, work=work, resume=resume, about=about)
    bar.close()
    if accelerator.is_main_process:
        (work / "curve.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in curve))


def save(training: TrainState, curve: Curve, *, work: Path, resume: Path, about: dict[str, Any]) -> None:
    """Write the checkpoint and the resume state that are due at this step, in this order."""
    config, step = training.config, training.step
    if not training.accelerator.is_main_process:
        return
    if step % config.save_every == 0:
        averages = {average.decay: average.weights for average in training.averages}
        save_checkpoint(work / f"step-{step}", averages, config.model, about={**about, "step": step})
    if step % config.state_every == 0 or step == config.steps:
        save_state(resume, step, training.tensors(), config=config.digest, about={"curve": curve})
