"""Auxiliary losses: what they see, where their gradients go, and that nothing of them is left without them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning.compose import Unconditional
from ldm.data.loading.batch import Batch
from ldm.diffusion.auxiliary import AuxiliaryInputs, AuxiliaryLoss
from ldm.diffusion.criterion import L2
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DenoisingLoss, DiffusionLoss, NoiseKeys
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.time_density import Uniform
from ldm.diffusion.weighting import Uniform as UniformWeight
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.unet import UNet
from ldm.randomness import keys
from ldm.training.diffusion import DiffusionModule

B, TAP = 4, "middle.0"


class Alignment(AuxiliaryLoss):
    """The mean square of a projection of each tap."""

    def __init__(self, weight: float, taps: tuple[str, ...] = (TAP,)) -> None:
        super().__init__(weight, taps)
        with torch.random.fork_rng():
            self.projector = nn.Linear(1, 1)
        self.seen: list[tuple[Mapping[str, Tensor], AuxiliaryInputs]] = []

    def forward(self, features: Mapping[str, Tensor], batch: AuxiliaryInputs) -> Tensor:
        self.seen.append((features, batch))
        return sum(self.projector(h.flatten(1).mean(1, keepdim=True)).square()[:, 0] for h in features.values())


class Pictures(AuxiliaryLoss):
    """The mean square of the pictures."""

    needs_images = True

    def forward(self, features: Mapping[str, Tensor], batch: AuxiliaryInputs) -> Tensor:
        return batch.images.square().flatten(1).mean(1)


def denoiser(**changes: Any) -> Denoiser:
    torch.manual_seed(0)
    unet = UNet(3, 3, 16, (1, 2), 1, (False, True), num_heads=2, groups=8, zero_init_residual=False, **changes)
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    return Denoiser(unet, ScaledLinear(), V())


def loss_of(**auxiliary: AuxiliaryLoss) -> DiffusionLoss:
    return DiffusionLoss(UniformWeight(), Uniform(), L2(), auxiliary=auxiliary)


X0 = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = NoiseKeys(keys(0, "test", count=B), torch.arange(B), B)


def run(loss: DiffusionLoss, model: Denoiser, **more: Any) -> tuple[DenoisingLoss, dict[str, Tensor]]:
    """The result, and the gradients of the network's parameters by name; zero where there are none."""
    result = loss(model, X0, {}, NOISE, **more)
    named = dict(model.network.named_parameters())
    gradients = torch.autograd.grad(result.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return result, dict(zip(named, gradients, strict=True))


def test_weight_0_and_no_auxiliary_loss_are_the_same_bit_for_bit() -> None:
    plain, gradients = run(DiffusionLoss(UniformWeight(), Uniform(), L2()), denoiser())
    zero, zero_gradients = run(loss_of(alignment=Alignment(0.0)), denoiser())
    assert plain.auxiliary == {} and set(zero.auxiliary) == {"alignment"}
    assert torch.equal(plain.loss, zero.loss) and torch.equal(plain.errors, zero.errors)
    assert all(torch.equal(gradients[name], zero_gradients[name]) for name in gradients)


def test_the_terms_add_up_by_their_weights_and_validation_leaves_them_out() -> None:
    plain, _ = run(DiffusionLoss(UniformWeight(), Uniform(), L2()), denoiser())
    loss = loss_of(one=Alignment(0.5), two=Alignment(2.0, ("down.0.blocks.0", TAP)))
    result, _ = run(loss, denoiser())
    one, two = result.auxiliary["one"], result.auxiliary["two"]
    torch.testing.assert_close(result.loss, plain.loss + 0.5 * one + 2.0 * two)
    assert float(one) > 0 and not one.requires_grad and not torch.equal(one, two)
    calls = len(loss.auxiliary["one"].seen)
    without, _ = run(loss, denoiser(), auxiliary=False)
    assert torch.equal(without.loss, plain.loss) and without.auxiliary == {}
    assert len(loss.auxiliary["one"].seen) == calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_tapped_module_and_what_is_before_it(checkpointing: bool) -> None:
    model = denoiser(gradient_checkpointing=checkpointing)
    (_, plain), (_, more) = run(loss_of(), model), run(loss_of(a=Alignment(100.0)), model)
    changed = {name for name in plain if not torch.equal(plain[name], more[name])}
    assert "conv_in.weight" in changed and f"{TAP}.res.conv_2.weight" in changed
    assert not any(name.startswith(("up.", "conv_out.", "norm_out.", "middle.1.")) for name in changed)


def test_inside_of_a_recomputed_block_the_gradients_are_the_same() -> None:
    tap = f"{TAP}.res"
    found = [run(loss_of(a=Alignment(100.0, (tap,))), denoiser(gradient_checkpointing=c))[1] for c in (False, True)]
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])


def test_a_loss_sees_its_taps_and_the_batch() -> None:
    model, loss = denoiser(), loss_of(a=Alignment(1.0), b=Alignment(1.0, ("conv_in",)))
    images = torch.rand(B, 3, 16, 16)
    result, _ = run(loss, model, images=images)
    (features, batch), (other, _) = loss.auxiliary["a"].seen[0], loss.auxiliary["b"].seen[0]
    assert features.keys() == {TAP} and other.keys() == {"conv_in"}
    assert batch.images is images and batch.x0 is X0 and batch.cond == {}
    level = model.schedule(batch.t).like(X0)
    torch.testing.assert_close(batch.z, level.alpha * batch.x0 + level.sigma * batch.eps)
    torch.testing.assert_close(other["conv_in"], model.network.conv_in(batch.z))
    torch.testing.assert_close(batch.x0_prediction, model.bind({})(batch.z, batch.t).x0)
    assert torch.equal(batch.t, result.t) and batch.x0_prediction.requires_grad


@pytest.mark.parametrize("broken", [False, True])
def test_no_hook_stays(broken: bool) -> None:
    model, loss = denoiser(), loss_of(a=Alignment(1.0, (TAP, "conv_in")))
    if broken:
        model.network.up[0].forward = lambda *args: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run(loss, model)
    else:
        run(loss, model)
    assert not any(module._forward_hooks for module in model.network.modules())


def test_a_tap_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'midle\.0'.*middle\.0"):
        loss_of(a=Alignment(1.0, (TAP, "midle.0"))).check(denoiser())
    loss_of(a=Alignment(1.0)).check(denoiser())


def test_a_compiled_network_cannot_be_tapped() -> None:
    model = denoiser()
    model.network.middle.compile()
    with pytest.raises(UserError, match="compile=false"):
        loss_of(a=Alignment(1.0)).check(model)
    loss_of(a=Pictures(1.0)).check(model)


def test_a_tap_without_a_tensor_is_refused() -> None:
    with pytest.raises(UserError, match=r"'down\.0' returned a list"):
        run(loss_of(a=Alignment(1.0, ("down.0",))), denoiser())
    with pytest.raises(UserError, match="'middle' did not run"):
        run(loss_of(a=Alignment(1.0, ("middle",))), denoiser())


def test_cached_latents_have_no_pictures() -> None:
    with pytest.raises(UserError, match=r"auxiliary\.a needs the pictures.*latents=null"):
        run(loss_of(a=Pictures(1.0)), denoiser())


def test_a_loss_is_one_number_a_sample() -> None:
    term = Alignment(1.0)
    term.forward = lambda features, batch: batch.x0.mean()
    with pytest.raises(UserError, match=r"auxiliary\.a returned \[\]"):
        run(loss_of(a=term), denoiser())


@pytest.mark.parametrize("name", ["loss", "a.b", "keys"])
def test_names_that_would_hide_others_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"auxiliary.{name}"):
        loss_of(**{name: Alignment(1.0)})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match=f"weight={weight}"):
        Alignment(weight)


class Passing(nn.Module):
    """A first stage whose latents are the pictures themselves."""

    factor, latent_channels = 1, 3

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images


def test_the_training_step_logs_and_trains_it_and_validation_does_not_see_it() -> None:
    loss = loss_of(alignment=Alignment(0.5), pictures=Pictures(1.0))
    module = DiffusionModule(
        LatentDiffusion(denoiser(), Unconditional(), Passing()), loss, lambda p: torch.optim.SGD(p, lr=0.1)
    )
    logged: dict[str, Tensor] = {}
    module.log_train = lambda values, batch_size: logged.update(values)
    module.log = lambda name, value, **more: logged.update({name: value})
    none, at = torch.zeros(B, 2, dtype=torch.int64), torch.arange(B)
    batch = Batch(X0, {}, at, NOISE.rng_keys, 0, none, none, at, B)
    total = module.training_step(batch, 0)
    total.backward()
    optimized = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    weight = loss.auxiliary["alignment"].projector.weight
    assert any(p is weight for p in optimized) and float(weight.grad.abs()) > 0
    assert set(logged) == {"loss", "alignment", "pictures"}
    with torch.no_grad():
        module.validation_step(batch, 0)
    torch.testing.assert_close(logged["val/loss"] + 0.5 * logged["alignment"] + logged["pictures"], logged["loss"])
