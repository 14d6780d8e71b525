"""What depends on the hardware and not on the result: how training is laid out over devices and processes.

Nothing here changes which samples are seen, and results agree to float tolerance. Weights stand in state files whole
and under the same names, so a training may go on under another layout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dod_models.blocks import BackboneBlock, VitBlock
from dod_models.config import Frozen
from dod_models.ema import is_sharded, joined


class Compute(Frozen):
    """`experiments.KEY.compute` in params.yaml; part of no digest."""

    micro_batch: PositiveInt | None = None  # images that a process computes with at a time; None: its share
    sharding: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, moments and averages divided over the processes
    compile: bool = False  # the blocks, by torch.compile
    checkpointing: bool = False  # recompute the blocks' activations in the backward pass, to save memory
    peak_tflops: PositiveFloat | None = None  # of one device, for its utilisation; None: from a table of GPUs


def accelerator_for(precision: str) -> Accelerator:
    """Device and processes as the environment states them."""
    # The buffers are constants, and gradients need no second copy.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=precision, kwargs_handlers=[ddp])


def prepare(model: nn.Module, compute: Compute, accelerator: Accelerator) -> nn.Module:
    """The model to call in training; `model` keeps its parameters' names, and under FSDP holds shards from now on."""
    blocks = [module for module in model.modules() if isinstance(module, BackboneBlock | VitBlock)]
    for block in blocks:
        forward = torch.compile(block.forward) if compute.compile else block.forward
        if compute.checkpointing:  # nothing in a block is random
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward  # type: ignore[method-assign]
    if compute.sharding == "ddp" or accelerator.num_processes == 1:
        prepared: nn.Module = accelerator.prepare_model(model)
        return prepared
    # torch's own: accelerate's plugin for it knows no processes on a CPU, where tests run
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    return model


@contextmanager
def synchronizing(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Forward and backward of a micro-batch: processes exchange gradients on a step's last one alone."""
    tell = getattr(model, "set_requires_gradient_sync", None)  # under FSDP
    if tell is not None:
        tell(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


@torch.no_grad()
def whole(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copies in the host's memory, shards joined, which takes all processes; empty for those that don't `keep` them."""
    found = {}
    for name, tensor in tensors.items():
        full = joined(tensor)
        if keep:
            found[name] = full.detach().cpu().contiguous()
    return found


@torch.no_grad()
def receive(target: Tensor, value: Tensor | None) -> None:
    """Copy `value`, which the first process gives, into `target` on every process, or into its shards."""
    full = target
    if is_sharded(target):
        full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if value is not None:
        full.copy_(value)
    if dist.is_initialized():
        dist.broadcast(full, 0)
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None))


class Processes:
    """The processes that train together, and what they tell each other outside of the step, in the hosts' memory."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.first = accelerator.is_main_process
        # one of its own, for that of the gradients may know GPUs only
        self.group: Any = dist.new_group(backend="gloo") if self.count > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it is set on one of them."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags)

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, in a new first dimension."""
        if self.count == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(found, tensor.contiguous(), group=self.group)
        return torch.stack(found)

    def told(self, value: Any) -> Any:
        """What the first process gave, on all of them."""
        if self.count == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self.group)
        return told[0]

    def check_equal(self, facts: dict[str, str]) -> None:
        """ValueError where a process, perhaps on another machine, has other facts than the first."""
        first = self.told(facts)
        for name, value in facts.items():
            if value != first[name]:
                raise ValueError(
                    f"process {self.rank}: {name} is {value[:12]}..., the first process has {first[name][:12]}...; "
                    "give every machine the same params.yaml and latents"
                )

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def end(self) -> None:
        """Part in good order, so that nobody complains of peers that have gone."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()
