"""The state of training, and the config that it begins from: a pure function of both and the number of steps made."""

import json
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dod_models import draws
from dod_models.checkpoint import check_tensors, load_weights
from dod_models.compute import Compute, prepare, receive, whole
from dod_models.config import Frozen, local_file
from dod_models.ema import Ema, joined
from dod_models.model import DoD, ModelConfig

Decay = Annotated[float, Field(gt=0, lt=1)]


class WarmStart(Frozen):
    """Weights to begin from instead of random ones."""

    path: str  # a file of a checkpoint, e.g. train/KEY/step-N/ema-0.999.safetensors; also s3://BUCKET/PREFIX/NAME
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of that file: the config pins its bytes


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
    warm_start: WarmStart | None = None
    compute: Compute = Compute()

    @model_validator(mode="after")
    def check_multiples(self) -> "TrainConfig":
        """Checkpoints and states fall on rows of the curve, the last checkpoint on the last step."""
        for name in ("save_every", "state_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of log_every {self.log_every}")
        if self.steps % self.save_every:
            raise ValueError(f"steps {self.steps} is not a multiple of save_every {self.save_every}")
        return self

    def canonical(self) -> str:
        """Without `compute`, on which no result depends; and a warm start is mentioned only where there is one."""
        silent = {"compute"} | ({"warm_start"} if self.warm_start is None else set())
        return json.dumps(self.model_dump(mode="json", exclude=silent), sort_keys=True)


class TrainState:
    """Model, optimizer and averages, and how many steps they have seen."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        with draws.seeded(config.seed, "model"):
            self.raw = DoD(config.model)
        self.config, self.accelerator, self.step = config, accelerator, 0
        self.raw.to(accelerator.device)
        self.model = prepare(self.raw, config.compute, accelerator)
        self.optimizer = torch.optim.AdamW(
            self.raw.parameters(), config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.averages = [Ema(self.raw, decay=d, warm_up=config.ema_warmup) for d in config.ema_decays]
        if isinstance(self.model, DistributedDataParallel):
            self.rehearse()

    def rehearse(self) -> None:
        """A pass whose gradients are thrown away. DDP lays its buckets out anew after its first pass, and the last bit
        of a sum over three or more processes depends on that layout: a resumed training must not begin with another.
        """
        device, share = self.accelerator.device, self.config.batch_size // self.accelerator.num_processes
        rows = min(share, self.config.compute.micro_batch or share)
        x, t = torch.zeros(rows, *self.config.model.latent_shape, device=device), torch.zeros(rows, device=device)
        labels, keep = t.long(), torch.arange((rows + 1) // 2, device=device)
        with self.accelerator.autocast():
            predicted = self.model(x, t, labels, prior=x, keep=keep)
        self.accelerator.backward(predicted.float().sum())
        self.optimizer.zero_grad()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clipped AdamW step on the gradients that have come together, averages; returns the gradient's norm."""
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip)
        self.optimizer.step()
        for average in self.averages:
            average.update(self.raw, self.step)
        self.step += 1
        return joined(norm)

    def live(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; under FSDP this process's shards."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.raw.named_parameters():
            found[f"model/{name}"] = parameter
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
        for average in self.averages:
            found |= {f"ema-{average.decay}/{name}": w for name, w in average.weights.items()}
        return found

    def tensors(self) -> dict[str, Tensor]:
        """`live`, whole and in the host's memory, on the first process; all must ask for it."""
        return whole(self.live(), keep=self.accelerator.is_main_process)

    def weights(self) -> dict[float, dict[str, Tensor]]:
        """The averages by decay, as `tensors`."""
        return {a.decay: whole(a.weights, keep=self.accelerator.is_main_process) for a in self.averages}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """The inverse of `tensors`, from those that the first process gives; ValueError where they don't fit."""
        for parameter in self.raw.parameters():
            zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        live = self.live()
        if self.accelerator.is_main_process:
            check_tensors(tensors, live, place=f"the resume state of step {step}, perhaps of an older version of dod")
        for name, target in live.items():
            receive(target, tensors.get(name))
        self.step = step

    def warm_start(self) -> None:
        """Begin from the weights that the config names, if it does, in the model and in the averages."""
        given, weights = self.config.warm_start, dict[str, Tensor]()
        if given is None:
            return
        parameters = dict(self.raw.named_parameters())
        if self.accelerator.is_main_process:
            weights = load_weights(local_file(given.path), sha256=given.sha256)
            check_tensors(weights, parameters, place=given.path)
        for name, parameter in parameters.items():
            for target in (parameter, *(average.weights[name] for average in self.averages)):
                receive(target, weights.get(name))
