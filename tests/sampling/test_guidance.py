"""Guidance on exact scores: a mixture of two Gaussian classes, where every guided estimate has a closed form."""

from copy import deepcopy
from math import log

import pytest
import torch
from torch import Tensor, nn

from ldm.config.build import build
from ldm.config.compose import CONFIGS, compose
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Denoised, Epsilon
from ldm.diffusion.schedule import Cosine, Level, ScaledLinear, VariancePreserving
from ldm.errors import UserError
from ldm.sampling.autoguidance import Autoguidance
from ldm.sampling.guidance import ClassifierFree, Guidance, from_x0
from ldm.sampling.interval import Interval
from ldm.sampling.projected import Projected
from ldm.sampling.rescaled import Rescaled
from tests.networks.toy import ToyNetwork

SCHEDULE = ScaledLinear()
MEANS = torch.tensor([[0.9, -0.4, 0.3, 0.0], [-0.7, 0.5, 0.2, -0.6]], dtype=torch.float64)  # of the classes
WEIGHTS = (0.3, 0.7)
STD = 0.35
SHAPE = (4, 1, 1)  # a latent of four numbers
CONFIGURED = sorted(path.stem for path in (CONFIGS / "guidance").glob("*.yaml"))


def log_density(z: Tensor, t: Tensor, tokens: Tensor, spread: float = 1.0) -> Tensor:
    """log p_t(z | class) [B]; the class -1 is the mixture of both. `spread` widens the classes."""
    level = SCHEDULE(t).like(z)
    variance = level.alpha**2 * (spread * STD) ** 2 + level.sigma**2
    squares = [((z - level.alpha * mean.view(SHAPE)).square() / variance).flatten(1).sum(1) for mean in MEANS]
    logs = [-square / 2 - 2 * variance.flatten().log() for square in squares]
    mixture = torch.logsumexp(torch.stack([p + log(w) for p, w in zip(logs, WEIGHTS, strict=True)]), dim=0)
    return torch.where(tokens == 0, logs[0], torch.where(tokens == 1, logs[1], mixture))


def eps_of(log_p: object, z: Tensor, t: Tensor) -> Tensor:
    """eps = -sigma grad log p_t(z)."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(log_p(z).sum(), z)
    return -SCHEDULE(t).like(z).sigma * score


class Exact(ToyNetwork):
    """A network that knows the score of its class, and notes the batch sizes that it saw."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        self.spread = spread
        self.batches: list[int] = []

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        self.batches.append(len(z))
        t = t.to(torch.float64)
        return eps_of(lambda x: log_density(x, t, tokens, self.spread), z, t)


class InDouble(Denoiser):
    """A denoiser that keeps float64, so that closed forms hold to it."""

    def output(self, z: Tensor, t: Tensor, level: Level, inputs: dict[str, Tensor]) -> Tensor:
        return self.network(z, t, **inputs)


def denoiser(spread: float = 1.0) -> InDouble:
    return InDouble(Exact(spread), SCHEDULE, Epsilon())


def same(found: Denoised, wanted: Denoised, rtol: float, atol: float) -> None:
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=rtol, atol=atol)


def points(n: int = 6) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CLASSES = torch.tensor([0, 1, 0, 1, 0, 1])
CONDITION = {"tokens": CLASSES}
NOTHING = {"tokens": torch.full((6,), -1)}


def times(t: float, n: int = 6) -> Tensor:
    return torch.full((n,), t, dtype=torch.float64)


def guided(
    guidance: Guidance, scale: float, t: float = 400.0, uncond: dict[str, Tensor] = NOTHING
) -> tuple[Denoised, list[int]]:
    """The guided estimate at the points, and the batch sizes of the network's calls."""
    model = denoiser()
    return guidance(model, CONDITION, uncond, scale)(points(), times(t)), model.network.batches


def plain(tokens: Tensor, t: float = 400.0, spread: float = 1.0) -> Denoised:
    return denoiser(spread).bind({"tokens": tokens})(points(), times(t))


def consistent(found: Denoised, t: float) -> None:
    """z = alpha x0 + sigma eps holds for what samplers are given."""
    level = SCHEDULE(times(t)).like(points())
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, points(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [20.0, 400.0, 900.0])
@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_the_guided_score_is_exact(scale: float, t: float) -> None:
    """score = grad log p(z) + scale grad log p(class | z): the class's posterior to the power of the scale."""
    found, batches = guided(ClassifierFree(), scale, t)

    def tilted(z: Tensor) -> Tensor:
        mixture = log_density(z, times(t), NOTHING["tokens"])
        prior = torch.tensor(WEIGHTS, dtype=torch.float64)[CLASSES].log()
        posterior = log_density(z, times(t), CLASSES) + prior - mixture  # Bayes
        return mixture + scale * posterior

    torch.testing.assert_close(found.eps, eps_of(tilted, points(), times(t)), rtol=0, atol=1e-12)
    consistent(found, t)
    assert batches == [12]  # both halves in one call


def test_a_negative_prompt_is_what_it_leads_away_from() -> None:
    other = {"tokens": 1 - CLASSES}
    found, _ = guided(ClassifierFree(), 3.0, uncond=other)
    to, away = plain(CLASSES), plain(1 - CLASSES)
    torch.testing.assert_close(found.eps, away.eps + 3.0 * (to.eps - away.eps), rtol=0, atol=1e-12)


def test_scale_1_makes_no_unconditional_call() -> None:
    for guidance in (ClassifierFree(), Projected(), Rescaled(ClassifierFree()), Interval(ClassifierFree())):
        found, batches = guided(guidance, 1.0)
        same(found, plain(CLASSES), rtol=0, atol=0)
        assert batches == [6]


def test_an_interval_guides_inside_alone_and_saves_the_call_outside() -> None:
    level = SCHEDULE(torch.tensor([200.0, 500.0], dtype=torch.float64))
    low, high = (level.sigma / level.alpha).tolist()
    guidance = Interval(ClassifierFree(), low, high)
    full, _ = guided(ClassifierFree(), 3.0, 500.0)
    for t, calls in ((501.0, [6]), (500.0, [12]), (201.0, [12]), (200.0, [6])):  # low < level <= high
        found, batches = guided(guidance, 3.0, t)
        assert batches == calls
        same(found, full if t == 500.0 else found, rtol=0, atol=0)
        if calls == [6]:
            same(found, plain(CLASSES, t), rtol=0, atol=0)


def test_rows_at_different_levels_are_guided_each_by_its_own() -> None:
    level = SCHEDULE(torch.tensor(500.0, dtype=torch.float64))
    guidance = Interval(ClassifierFree(), 0.0, float(level.sigma / level.alpha))
    mixed = torch.tensor([400.0, 900.0] * 3, dtype=torch.float64)
    found = guidance(denoiser(), CONDITION, NOTHING, 3.0)(points(), mixed)
    inside, outside = guided(ClassifierFree(), 3.0, 400.0)[0], plain(CLASSES, 900.0)
    torch.testing.assert_close(found.eps[::2], inside.eps[::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.x0[1::2], outside.x0[1::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
def test_rescaling_goes_its_share_of_the_way_to_the_conditional_spread(factor: float) -> None:
    found, batches = guided(Rescaled(ClassifierFree(), factor), 5.0)
    whole, to = guided(ClassifierFree(), 5.0)[0].x0, plain(CLASSES).x0
    spread = factor * to.flatten(1).std(1) + (1 - factor) * whole.flatten(1).std(1)
    torch.testing.assert_close(found.x0.flatten(1).std(1), spread, rtol=1e-12, atol=0)
    cosine = torch.cosine_similarity(found.x0.flatten(1), whole.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    consistent(found, 400.0)
    assert batches == [12]


def test_projection_with_everything_kept_is_classifier_free() -> None:
    found, batches = guided(Projected(eta=1.0), 5.0)
    same(found, guided(ClassifierFree(), 5.0)[0], rtol=0, atol=1e-12)
    assert batches == [12]


def test_projection_keeps_the_part_along_the_conditional_by_eta() -> None:
    to, direction = plain(CLASSES).x0.flatten(1), (plain(CLASSES).x0 - plain(NOTHING["tokens"]).x0).flatten(1)
    along = lambda x: (x * to).sum(1) / to.norm(dim=1)  # noqa: E731
    for eta in (0.0, 0.25):
        found, _ = guided(Projected(eta=eta), 5.0)
        update = (found.x0.flatten(1) - to) / 4.0
        torch.testing.assert_close(along(update), eta * along(direction), rtol=0, atol=1e-12)
        across = update - (along(update) / to.norm(dim=1))[:, None] * to
        whole = direction - (along(direction) / to.norm(dim=1))[:, None] * to
        torch.testing.assert_close(across, whole, rtol=0, atol=1e-12)
        consistent(found, 400.0)


def test_the_direction_is_cut_to_its_threshold() -> None:
    direction = (plain(CLASSES).x0 - plain(NOTHING["tokens"]).x0).flatten(1).norm(dim=1)
    threshold = float(direction.median())
    found, _ = guided(Projected(eta=1.0, norm_threshold=threshold), 5.0)
    update = (found.x0 - plain(CLASSES).x0).flatten(1).norm(dim=1) / 4.0
    torch.testing.assert_close(update, direction.clamp(max=threshold), rtol=1e-12, atol=0)


def test_momentum_gathers_within_a_run_and_starts_anew_with_the_next() -> None:
    guidance = Projected(eta=1.0, momentum=-0.5)
    for _ in range(2):
        denoise, gathered = guidance(denoiser(), CONDITION, NOTHING, 2.0), torch.zeros_like(points())
        for t in (400.0, 300.0, 200.0):
            to = plain(CLASSES, t).x0
            gathered = to - plain(NOTHING["tokens"], t).x0 - 0.5 * gathered
            torch.testing.assert_close(denoise(points(), times(t)).x0 - to, gathered, rtol=0, atol=1e-12)


def test_autoguidance_leads_away_from_the_weaker_model_under_the_condition() -> None:
    strong, weak = denoiser(), denoiser(spread=1.6)
    found = Autoguidance(ClassifierFree(), weak)(strong, CONDITION, NOTHING, 2.5)(points(), times(400.0))
    to, away = plain(CLASSES), plain(CLASSES, spread=1.6)
    torch.testing.assert_close(found.eps, away.eps + 2.5 * (to.eps - away.eps), rtol=0, atol=1e-12)
    assert (strong.network.batches, weak.network.batches) == ([6], [6])
    unguided = Autoguidance(ClassifierFree(), weak)(strong, CONDITION, NOTHING, 1.0)(points(), times(400.0))
    same(unguided, to, rtol=0, atol=0)
    assert weak.network.batches == [6]  # at scale 1 not asked


def test_a_weaker_model_reads_the_texts_itself() -> None:
    weak = denoiser(spread=1.6)
    describe = lambda fields, device: {"tokens": torch.tensor([int(text) for text in fields["caption"]])}  # noqa: E731
    guidance = Autoguidance(ClassifierFree(), weak, describe)
    texts = {"caption": [str(1 - int(c)) for c in CLASSES]}  # it reads the other class
    found = guidance(denoiser(), CONDITION, NOTHING, 2.0, texts)(points(), times(400.0))
    away = plain(1 - CLASSES, spread=1.6)
    torch.testing.assert_close(found.x0, 2.0 * plain(CLASSES).x0 - away.x0, rtol=0, atol=1e-12)


def test_a_weaker_model_of_other_levels_or_latents_is_refused() -> None:
    stage, other = nn.Linear(2, 2), nn.Linear(2, 2)
    weak = Autoguidance(ClassifierFree(), denoiser(spread=1.6), first_stage=deepcopy(stage))
    weak.check(denoiser(), stage)
    for guidance in (weak, Rescaled(weak)):
        with pytest.raises(UserError, match="latents of another first stage"):
            guidance.check(denoiser(), other)
    for schedule in (Cosine(), ScaledLinear(0.0015, 0.0195), VariancePreserving()):
        with pytest.raises(UserError, match=f"another noise schedule .{type(schedule).__name__}"):
            Autoguidance(ClassifierFree(), Denoiser(Exact(), schedule, Epsilon())).check(denoiser(), stage)


def test_wrappers_compose_in_any_order() -> None:
    level = SCHEDULE(torch.tensor(500.0, dtype=torch.float64))
    high = float(level.sigma / level.alpha)
    weak = denoiser(spread=1.6)
    one = Interval(Autoguidance(Rescaled(ClassifierFree(), 0.5), weak), 0.0, high)
    other = Rescaled(Interval(Autoguidance(ClassifierFree(), weak), 0.0, high), 0.5)
    for t in (400.0, 600.0):
        same(guided(one, 3.0, t)[0], guided(other, 3.0, t)[0], rtol=0, atol=0)
    to, away = plain(CLASSES), plain(CLASSES, spread=1.6)
    x0 = away.x0 + 3.0 * (to.x0 - away.x0)
    ratio = to.x0.flatten(1).std(1) / x0.flatten(1).std(1)
    wanted = from_x0(x0 * (0.5 * ratio + 0.5).view(-1, 1, 1, 1), points(), times(400.0), SCHEDULE)
    same(guided(one, 3.0, 400.0)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Rescaled(ClassifierFree(), 1.5),
        lambda: Interval(ClassifierFree(), 2.0, 1.0),
        lambda: Projected(momentum=1.0),
        lambda: Projected(norm_threshold=0.0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(UserError, match=r"guidance\.\w+="):
        wrong()


def configured(name: str) -> Guidance:
    """A shipped guidance as sample.py composes it; the weaker checkpoint is a wider exact model."""
    cfg = compose("sample", [f"guidance={name}", "checkpoint=x", "out=x"]).guidance
    if name == "autoguidance":
        return Autoguidance(build(cfg.guidance), denoiser(spread=1.6))
    return build(cfg)


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_shipped_guidance_follows_the_scale(name: str) -> None:
    """Scale 1 is the condition alone; the more of it, the farther from there."""
    unguided, few, many = (guided(configured(name), scale)[0].x0 for scale in (1.0, 2.0, 6.0))
    to = plain(CLASSES).x0
    torch.testing.assert_close(unguided, to, rtol=0, atol=0)
    near, far = ((x0 - to).flatten(1).norm(dim=1) for x0 in (few, many))
    assert bool((near > 0).all() and (far > 1.5 * near).all())
    assert configured(name).applies(SCHEDULE, times(400.0), 2.0).all()
