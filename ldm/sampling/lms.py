"""K-LMS: a linear multistep method on the probability-flow equation (k-diffusion, `sample_lms`)."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.sampling.sampler import Noise, Sampler, Steps, weighted_sum


class LMS(Sampler):
    """Adams-Bashforth on uneven steps in s = sigma / alpha, where y = z / alpha follows dy/ds = eps.

    Each step integrates the polynomial through the last `order` slopes. The first steps are of lower order. A
    step from a level without signal (s is infinite there) is Euler's, and no slope for the next ones.
    """

    def __init__(self, order: int = 4) -> None:
        if not 1 <= order <= 4:
            raise UserError(f"order={order}: expected 1 to 4")
        self.order = order

    def __call__(self, denoise: Denoise, z: Tensor, steps: Steps, noise: Noise) -> Tensor:
        slopes: list[tuple[float, Tensor]] = []  # (s, eps), the newest last
        for now, then in steps:
            x0, eps = denoise(z, now.t)
            if now.alpha == 0:
                z = then.alpha * x0 + then.sigma * eps  # Euler
                continue
            slopes = [*slopes, (now.ratio, eps)][-self.order :]
            coefficients = weights([s for s, _ in slopes], then.ratio)
            z = then.alpha * (z / now.alpha + weighted_sum(coefficients, [eps for _, eps in slopes]))
        return z


def weights(nodes: Sequence[float], end: float) -> list[float]:
    """The integrals, from the last node to `end`, of the polynomials that are 1 at one node and 0 at the others.

    Gauss-Legendre's two points integrate cubics exactly, so four nodes at most.
    """
    middle, half = (nodes[-1] + end) / 2, (end - nodes[-1]) / 2
    points = (middle - half / 3**0.5, middle + half / 3**0.5)

    def lagrange(j: int, x: float) -> float:
        return prod((x - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)

    return [half * sum(lagrange(j, x) for x in points) for j in range(len(nodes))]
