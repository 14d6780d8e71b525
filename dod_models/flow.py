"""The straight path from noise to data, and the loss on its velocity.

The convention, stated once: t = 0 is noise, t = 1 is data (as in SiT and FiTv2; the paper writes the mirror image).
Shapes: B batch, C channels, H W height and width of a latent.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "B C H W"]
Time = Float[Tensor, " B"]  # the space keeps ruff from reading B as a name
Velocity = Callable[[Latent, Time], Latent]


def point_on_path(data: Latent, noise: Latent, t: Time) -> Latent:
    """x_t = t * data + (1 - t) * noise (eq. 1 and section 3.1, time reversed)."""
    t = t.view(-1, 1, 1, 1)
    return t * data + (1 - t) * noise


def velocity_target(data: Latent, noise: Latent) -> Latent:
    """d x_t / d t = data - noise, the target of the regression (eq. 3)."""
    return data - noise


def logit_normal(normal: Time) -> Time:
    """Training times t = sigmoid(u) of standard normal draws u (eq. 11 prints the inverse)."""
    return normal.sigmoid()


def flow_loss(predicted: Latent, data: Latent, noise: Latent) -> Float[Tensor, ""]:
    """Plain mean squared error of the velocity, without weighting over t (eq. 3)."""
    return (predicted - velocity_target(data, noise)).square().mean()
