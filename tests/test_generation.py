"""The generator: text to image, image to image, inpainting both ways, sizes, batches that fit."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Compose, MaskedImage
from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner
from ldm.data.loading.batch import Batch
from ldm.diffusion.criterion import L2
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import Denoised, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.time_density import Uniform as UniformTimes
from ldm.diffusion.weighting import Uniform
from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer
from ldm.generation import Generator, Request, SamplingSettings
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.autoencoder import Decoder, Encoder
from ldm.networks.unet import UNet
from ldm.randomness import keys
from ldm.sampling.autoguidance import Autoguidance
from ldm.sampling.ddim import DDIM
from ldm.sampling.dpmpp_2m import DPMPP2M
from ldm.sampling.grid import Trailing
from ldm.sampling.guidance import ClassifierFree
from ldm.sampling.image_to_image import add_noise_at, last_times, steps_made
from ldm.sampling.inpainting import inpaint, latent_mask
from ldm.sampling.noise import ImageNoise
from ldm.sampling.sampler import steps_of
from ldm.training.diffusion import DiffusionModule
from tests.networks.toy import ToyNetwork

SIZE = (32, 32)
SETTINGS = SamplingSettings(DDIM(), Trailing(), ClassifierFree(), steps=4, guidance_scale=2.0)


class Lengths(Conditioner):
    """Two tokens of the caption's length."""

    def widths(self, latent_channels: int) -> Widths:
        return Widths(tokens=8)

    def forward(self, fields: object, keys: Tensor | None = None) -> Condition:
        lengths = torch.tensor([float(len(text)) for text in fields["caption"]])
        return Condition(tokens=torch.stack([lengths.sin(), lengths.cos()], 1)[:, None].repeat(1, 2, 4))


def model(in_channels: int = 4, beside: MaskedImage | None = None) -> LatentDiffusion:
    """A latent diffusion of factor 4 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(in_channels, 4, 16, (1, 2), 1, (False, True), head_channels=16, context_dim=8, groups=8)
        for parameter in unet.parameters():  # what begins at zero says nothing
            nn.init.normal_(parameter, 0.0, 0.1)
        parts = Encoder(3, 8, (1, 1, 1), 1, 8, groups=4), KLRegularizer(), Decoder(4, 8, (1, 1, 1), 1, 3, groups=4)
        first_stage = FirstStage(*parts, latent_channels=4)
    conditioner = Lengths() if beside is None else Compose([Lengths(), beside])
    return LatentDiffusion(Denoiser(unet, ScaledLinear(), V()), conditioner, first_stage).eval()


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(model())


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    numbers = ImageNoise([seed])((3, *size))[0]
    return numbers.clamp(-1, 1)


def left_half(size: tuple[int, int] = SIZE) -> Tensor:
    mask = torch.zeros(1, *size)
    mask[:, :, : size[1] // 2] = 1.0
    return mask


def request(seed: int, **more: object) -> Request:
    return Request({"caption": "a red circle"}, seed, **more)


def one(
    generator: Generator, given: Request, settings: SamplingSettings = SETTINGS, size: tuple[int, int] = SIZE
) -> Tensor:
    return generator.batch([given], size, settings)[0]


def at(strength: float, steps: int = 4) -> SamplingSettings:
    return SamplingSettings(DDIM(), Trailing(), ClassifierFree(), steps, 2.0, strength)


def test_strength_1_leaves_nothing_of_the_picture(generator: Generator) -> None:
    plain = one(generator, request(3))
    assert torch.equal(one(generator, request(3, image=picture())), plain)
    assert not torch.equal(one(generator, request(3, image=picture()), at(0.75)), plain)


def test_the_less_strength_the_nearer_to_the_picture(generator: Generator) -> None:
    given = picture()
    decoded = generator.first_stage.decode(generator.first_stage.encode(given[None]))[0] * 0.5 + 0.5
    far = [
        float((one(generator, request(3, image=given), at(strength, 50)) - decoded.clamp(0, 1)).square().mean())
        for strength in (0.02, 0.3, 0.9)
    ]
    assert far[0] < far[1] < far[2], far


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(50, 0.8, 40), (50, 0.58, 29), (10, 1.0, 10), (10, 0.01, 1), (3, 0.99, 2)]
)
def test_the_grid_is_cut_to_its_end(steps: int, strength: float, made: int) -> None:
    times = Trailing()(ScaledLinear(), steps)
    left = last_times(times, strength)
    assert steps_made(steps, strength) == made == len(left) - 1
    assert torch.equal(left, times[-made - 1 :])


def test_a_picture_is_noised_to_its_level() -> None:
    t = torch.tensor(499.0, dtype=torch.float64)
    alpha2 = ScaledLinear().alphas_cumprod[499]
    found = add_noise_at(torch.full((1, 2), 3.0).double(), torch.full((1, 2), -2.0).double(), t, ScaledLinear())
    assert found.tolist() == [pytest.approx([3.0 * alpha2**0.5 - 2.0 * (1 - alpha2) ** 0.5] * 2, rel=1e-12)]


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(UserError, match=f"strength={strength}"):
        SamplingSettings(DDIM(), Trailing(), ClassifierFree(), 4, 7.5, strength).times(ScaledLinear())


def test_what_is_not_masked_stays_pixel_for_pixel(generator: Generator) -> None:
    given, mask = picture(), left_half()
    made = one(generator, request(3, image=given, mask=mask))
    torch.testing.assert_close(made[:, :, 16:], given[:, :, 16:] * 0.5 + 0.5, rtol=0, atol=1e-6)
    assert float((made[:, :, :16] - (given[:, :, :16] * 0.5 + 0.5)).abs().mean()) > 0.05


def test_a_full_mask_is_text_to_image_and_an_empty_one_changes_nothing(generator: Generator) -> None:
    everything, nothing = torch.ones(1, *SIZE), torch.zeros(1, *SIZE)
    torch.testing.assert_close(one(generator, request(3, image=picture(), mask=everything)), one(generator, request(3)))
    kept = one(generator, request(3, image=picture(), mask=nothing))
    torch.testing.assert_close(kept, picture() * 0.5 + 0.5)


def test_the_network_sees_the_kept_part_and_what_is_painted_depends_on_it() -> None:
    """A network that was not trained for it is shown the noised picture where that is kept."""
    whole, seen = model(), list[Tensor]()
    whole.denoiser.network.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    generator, mask = Generator(whole), left_half()
    made = [one(generator, request(3, image=picture(seed), mask=mask)) for seed in (0, 1)]
    calls = len(seen) // 2
    for number, (first, second) in enumerate(zip(seen[:calls], seen[calls:], strict=True)):
        assert not torch.equal(first[:, :, :, 4:], second[:, :, :, 4:])  # two pictures, at every step
        assert torch.equal(first[:, :, :, :4], second[:, :, :, :4]) == (number == 0)  # their effect on the rest
    assert float((made[0] - made[1])[:, :, :16].abs().mean()) > 1e-3
    t = torch.tensor([SETTINGS.times(ScaledLinear())[0]])
    known = generator.first_stage.encode(picture(1)[None])
    begun = add_noise_at(known, ImageNoise([3])((4, 8, 8)), t[0], ScaledLinear())
    torch.testing.assert_close(seen[calls][:1, :, :, 4:], begun[:, :, :, 4:])


def test_a_weaker_model_of_another_first_stage_is_refused(generator: Generator) -> None:
    other = model()
    guidance = Autoguidance(ClassifierFree(), other.denoiser, first_stage=other.first_stage)
    settings = replace(SETTINGS, guidance=guidance)
    one(generator, request(3), settings)  # its own weights, a copy of them
    nn.init.zeros_(next(other.first_stage.parameters()))
    again = Autoguidance(ClassifierFree(), other.denoiser, first_stage=other.first_stage)
    with pytest.raises(UserError, match="another first stage"):
        one(generator, request(3), replace(settings, guidance=again))


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=1.0), DPMPP2M()], ids=["ddim", "ddpm", "dpmpp_2m"])
def test_known_latents_stay_on_their_path(sampler: Callable[..., Tensor]) -> None:
    """The network is shown the known part at the level of each step, and it ends as it was given."""
    schedule, seeds = ScaledLinear(), list(range(40))
    known = ImageNoise([1000 + seed for seed in seeds])((4, 4, 4)).double()
    mask = torch.zeros(40, 1, 4, 4, dtype=torch.float64)
    mask[:, :, :2] = 1.0
    noise = ImageNoise(seeds)
    eps = noise((4, 4, 4)).double()
    seen: list[float] = []

    def network(z: Tensor, t: Tensor) -> Denoised:
        level = schedule(t).like(z)
        seen.append(float(((z - level.alpha * known) / level.sigma)[:, :, 2:].square().mean()))
        return Denoised(0.3 * z, (z - level.alpha * 0.3 * z) / level.sigma)

    times = Trailing()(schedule, 10)
    start = add_noise_at(known, eps, times[0], schedule)
    end = sampler(inpaint(network, known, mask, schedule), start, steps_of(times, schedule, len(start)), noise)
    torch.testing.assert_close(end[:, :, 2:], known[:, :, 2:], rtol=0, atol=1e-12)
    assert float((end - known)[:, :, :2].abs().min()) > 1e-6
    assert all(0.85 < value < 1.15 for value in seen)  # unit noise, at every step


def test_a_latent_is_made_anew_where_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, 4] = 1.0
    mask[0, 0, 7, 0] = 0.4
    mask[0, 0, 7, 7] = 0.5
    assert latent_mask(mask, 4).flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


class Seen(ToyNetwork):
    """A network of nine channels that notes what it is shown beside the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shown: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor, concat: Tensor) -> Tensor:
        self.shown.append(concat)
        return z * 0.1


def test_an_inpainting_network_is_shown_the_mask_and_the_rest_of_the_picture() -> None:
    whole = model(9, MaskedImage())
    whole.denoiser.network = Seen()
    generator = Generator(whole)
    given, mask = picture(), left_half()
    one(generator, request(3, image=given, mask=mask))
    shown = whole.denoiser.network.shown[0]
    assert shown.shape == (2, 5, 8, 8)  # negative and condition in one call
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))
    grey = given * (1.0 - mask)
    torch.testing.assert_close(shown[0, 1:], generator.first_stage.encode(grey[None])[0])
    one(generator, request(3))  # without a picture all of it is to be painted
    last = whole.denoiser.network.shown[-1]
    assert bool((last[:, 0] == 1).all())
    torch.testing.assert_close(last[0, 1:], generator.first_stage.encode(torch.zeros(1, 3, *SIZE))[0])


def test_a_unet_of_nine_channels_inpaints() -> None:
    generator = Generator(model(9, MaskedImage()))
    given, mask = picture(), left_half()
    made = one(generator, request(3, image=given, mask=mask))
    torch.testing.assert_close(made[:, :, 16:], given[:, :, 16:] * 0.5 + 0.5, rtol=0, atol=1e-6)
    other = one(generator, request(3, image=given * mask - (1 - mask), mask=mask))
    assert not torch.allclose(made[:, :, :16], other[:, :, :16])  # it looks at what stays
    same = one(generator, request(3, image=given * (1 - mask) + mask, mask=mask))
    torch.testing.assert_close(made[:, :, :16], same[:, :, :16])  # and not at what is masked


def test_an_inpainting_model_trains_on_what_it_is_shown() -> None:
    hole = MaskedImage(whole=0.0)
    whole = model(9, hole)
    module = DiffusionModule(whole, DiffusionLoss(Uniform(), UniformTimes(), L2()), torch.optim.AdamW)
    pair, none = torch.stack([picture(1), picture(2)]), torch.zeros(2, 2, dtype=torch.int64)
    batch = Batch(pair, {"caption": ["a", "b"]}, none[0], keys("step", count=2), 0, none, none, none[0], 2)
    loss = module.denoising_loss(batch, training=True).loss
    hole.whole = 1.0  # now everything is hidden
    assert not torch.equal(module.denoising_loss(batch, training=True).loss, loss)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (36, 44), (20, 64)])
def test_any_size_that_divides_is_made(generator: Generator, size: tuple[int, int]) -> None:
    made = one(generator, request(3, image=picture(size=size), mask=left_half(size)), at(0.5), size)
    assert made.shape == (3, *size) and bool(made.isfinite().all())


def test_a_picture_of_another_size_or_missing_in_a_batch_is_refused(generator: Generator) -> None:
    with pytest.raises(UserError, match="a picture of shape"):
        one(generator, request(3, image=picture(size=(16, 16))))
    with pytest.raises(UserError, match="1 of a batch's 2 requests have a picture"):
        generator.batch([request(3, image=picture()), request(4)], SIZE, SETTINGS)
    with pytest.raises(UserError, match="give the picture too"):
        one(generator, request(3, mask=left_half()))


class Small(Generator):
    """A generator in whose memory no more than `room` images fit."""

    def __init__(self, room: int) -> None:
        super().__init__(model())
        self.room = room
        self.tried: list[int] = []

    def batch(self, requests: object, size: object, settings: object, on_step: object = None) -> Tensor:
        self.tried.append(len(requests))
        if len(requests) > self.room:
            on_step(1)
            torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own refusal
        return super().batch(requests, size, settings, on_step)


def test_batches_are_halved_until_they_fit_and_no_step_is_told_twice(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [request(seed) for seed in range(11)]
    small, steps = Small(room=2), []
    made = list(small.generate(requests, SIZE, SETTINGS, batch_size=8, on_step=steps.append))
    assert small.tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert sum(steps) == 11 * 4
    assert "continuing with batch_size=2" in caplog.text
    torch.testing.assert_close(torch.stack(made), torch.stack(list(generator.generate(requests, SIZE, SETTINGS, 3))))


def test_an_image_that_does_not_fit_alone_is_told() -> None:
    with pytest.raises(UserError, match="one image does not fit"):
        list(Small(room=0).generate([request(0), request(1)], SIZE, SETTINGS))


def test_other_errors_are_not_taken_for_a_lack_of_memory(generator: Generator) -> None:
    class Broken(DDIM):
        def __call__(self, *given: object) -> Tensor:
            raise RuntimeError("shapes do not match")

    settings = SamplingSettings(Broken(), Trailing(), ClassifierFree(), 2, 7.5)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(generator.generate([request(0)], SIZE, settings))


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7])
def test_an_image_is_of_its_request_alone(generator: Generator, batch_size: int | None) -> None:
    given = [request(seed, image=picture(seed), mask=left_half()) for seed in range(4)]
    made = list(generator.generate(given, SIZE, at(0.5), batch_size))
    for i, alone in enumerate(given):
        torch.testing.assert_close(made[i], one(generator, alone, at(0.5)), rtol=0, atol=1e-5)
    assert prod(made[0].shape) and not torch.equal(made[0], made[1])


def test_sizes_that_the_network_cannot_take_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In generation and in training, for the size of the latents: 12 x 8 of 48 x 32 pixels."""

    def check_size(height: int, width: int) -> None:
        if (height, width) == (12, 8):
            raise UserError("patches of 8 do not fit")

    whole = model()
    monkeypatch.setattr(whole.denoiser.network, "check_size", check_size)
    monkeypatch.setattr(whole.denoiser.network, "forward", lambda *args, **more: pytest.fail("the network ran"))
    with pytest.raises(UserError, match="patches of 8"):
        Generator(whole).batch([request(3)], (48, 32), SETTINGS)
    module = DiffusionModule(whole, DiffusionLoss(Uniform(), UniformTimes(), L2()), torch.optim.AdamW)
    for sizes, refused in (([(32, 32)], False), ([(32, 32), (48, 32)], True)):
        module._trainer = SimpleNamespace(datamodule=SimpleNamespace(sizes=sizes))
        with pytest.raises(UserError, match="patches of 8") if refused else nullcontext():
            module.setup("fit")
