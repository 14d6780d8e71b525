"""How fast training runs: images a second, the share of the devices' arithmetic that the model needs, memory.

For the eye alone: it stands in the log and in no output.
"""

import resource
import time

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from dod_models.model import DoD, ModelConfig

# Dense bf16 TFLOPs of a device, by a part of its name: NVIDIA's data sheets of the A100, H100 and H200.
PEAKS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0}


def training_flops(config: ModelConfig, *, prior_drop: float) -> float:
    """FLOPs that a sample needs on average, 2 for a multiply-add: the forward pass, and twice as much backward.

    A sample pays for the LEM, and for a condition of its own for each token, only where it keeps its prior.
    """
    with torch.device("meta"):
        model = DoD(config)
        x, t, label = torch.empty(1, *config.latent_shape), torch.empty(1), torch.empty(1, dtype=torch.long)
    with torch.no_grad():
        with FlopCounterMode(display=False) as plain:
            model.velocity(x, t, label)
        with FlopCounterMode(display=False) as kept:
            model.velocity(x, t, label, model.embed_sample(x))
    needed: float = 3 * (prior_drop * plain.get_total_flops() + (1 - prior_drop) * kept.get_total_flops())
    return needed


def peak_flops(device: torch.device, *, stated: float | None) -> float | None:
    """FLOPs a second of a device at most: as `stated` in TFLOPs, or from the table; None if unknown."""
    if stated is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        stated = next((tflops for part, tflops in PEAKS.items() if part in name), None)
    return None if stated is None else stated * 1e12


class Speed:
    """Measures from one `start` to the next `read`, by the host's clock, which the reading of a row keeps honest."""

    def __init__(self, accelerator: Accelerator, *, flops_per_image: float, peak_tflops: float | None) -> None:
        self.device, self.flops_per_image = accelerator.device, flops_per_image
        peak = peak_flops(accelerator.device, stated=peak_tflops)
        self.peak = None if peak is None else peak * accelerator.num_processes

    def start(self, images: int) -> None:
        """The clock runs from here, with so many images seen."""
        self.begun, self.images = time.monotonic(), images

    def read(self, images: int) -> dict[str, str]:
        """Images a second, utilisation where the peak is known, the most memory that was in use (GPU's, or host's)."""
        rate = (images - self.images) / max(time.monotonic() - self.begun, 1e-9)
        shown = {"images/s": f"{rate:.1f}"}
        if self.peak is not None:
            shown["MFU"] = f"{100 * rate * self.flops_per_image / self.peak:.1f} %"
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device)
        else:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        return shown | {"memory": f"{used / 2**30:.1f} GiB"}
