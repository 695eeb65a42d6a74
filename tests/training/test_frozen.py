"""What is frozen is named in a checkpoint, not copied, and has to be the same when the run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.checkpoint import find_latest, fingerprint, load_tensors
from ldm.errors import UserError
from ldm.first_stage.perceptual import PerceptualDistance
from ldm.interop.model_folder import open_model_folder, write_model_folder
from ldm.networks.frozen import FrozenNetwork
from ldm.training import curriculum
from ldm.training.frozen import FrozenPart, frozen_parts, leave_out, note_origin, put_back
from tests.training.miniature import launch


class Network(FrozenNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.freeze()


class Parent(nn.Module):
    """One part of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.mixed[0].eval().requires_grad_(False)
        self.perceptual = PerceptualDistance(Network())
        self.moving = nn.BatchNorm1d(2).requires_grad_(False)  # its statistics go on changing
        self.register_buffer("count", torch.zeros(()))


def test_the_outermost_parts_that_nothing_changes_are_frozen() -> None:
    parent = Parent()
    note_origin(parent.mixed[0], "somewhere/model")
    parent.perceptual.network.origin = "network.pth"
    found = frozen_parts(parent)
    assert {name: part.origin for name, part in found.items()} == {
        "mixed.0": "somewhere/model",
        "perceptual.network": "network.pth",
    }
    assert found["mixed.0"].fingerprint == fingerprint(parent.mixed[0].state_dict())


def test_a_checkpoint_is_completed_with_the_modules_own_frozen_weights() -> None:
    parent = Parent()
    state = dict(parent.state_dict())
    checkpoint: dict[str, Any] = {"state_dict": dict(state)}
    leave_out(checkpoint, frozen_parts(parent))
    missing = {name for name in state if name.startswith(("mixed.0.", "perceptual.network."))}
    assert checkpoint["state_dict"].keys() == state.keys() - missing and len(missing) == 9
    put_back(checkpoint, frozen_parts(parent), state)
    assert checkpoint["state_dict"].keys() == state.keys()


def test_other_frozen_parts_are_refused_by_both_names() -> None:
    a, b = FrozenPart("a.pth", "1" * 16), FrozenPart("b.pth", "2" * 16)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    leave_out(checkpoint, {"part": a})
    with pytest.raises(UserError, match=r"another part: then 1{16} from a\.pth; now 2{16} from b\.pth"):
        put_back(checkpoint, {"part": b}, {})
    with pytest.raises(UserError, match=r"another part: then 1{16} from a\.pth; now not frozen"):
        put_back(checkpoint, {}, {})
    with pytest.raises(UserError, match=r"another more: then not frozen, or not there; now 2{16} from b\.pth"):
        put_back(checkpoint, {"part": a, "more": b}, {})
    put_back(checkpoint, {"part": FrozenPart("moved.pth", a.fingerprint)}, {})  # the same weights from elsewhere


@pytest.fixture(scope="module")
def first_stage(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return curriculum.run(*launch(tiny_shapes, run, "stages=[first_stage]"))["first_stage"]


def changed(folder: Path, out: Path) -> Path:
    """A model folder with the same model, one value of it another."""
    model = open_model_folder(folder)
    state = model.weights("ema")
    state["decoder.conv_out.bias"] += 1e-3
    write_model_folder(out, model.record, model.config_text, state, None, None)
    return out


@pytest.mark.parametrize("joint", [True, False], ids=["text encoder trained", "text encoder frozen"])
def test_a_diffusion_checkpoint_names_its_first_stage(
    first_stage: Path, tiny_shapes: Path, tmp_path: Path, joint: bool
) -> None:
    more = ["stages=[base]", f"conditioner.frozen={not joint}"]
    curriculum.run(*launch(tiny_shapes, tmp_path, *more, f"first_stage_from={first_stage}"))
    latest = find_latest(tmp_path / "base" / "checkpoints")
    assert latest is not None
    frozen = json.loads((latest / "state.json").read_text())["frozen"]
    weights = open_model_folder(first_stage).weights("ema")
    assert frozen["latent_diffusion.first_stage"] == {"origin": str(first_stage), "fingerprint": fingerprint(weights)}
    assert ("latent_diffusion.conditioner.encoder" in frozen) is not joint

    parts = {name: load_tensors(latest / f"{name}.safetensors")[0] for name in ("model", "ema", "optimizer")}
    for held in (parts["model"], parts["ema"]):
        assert not any("first_stage" in name for name in held)
        assert any("conditioner.encoder" in name for name in held) is joint
    size = sum(tensor.numel() for tensor in weights.values())
    assert sum(t.numel() for t in parts["optimizer"].values()) > 2 * size  # a copy would show in neither

    (tmp_path / "base" / "model" / "model.json").unlink()  # not finished any more
    curriculum.run(*launch(tiny_shapes, tmp_path, *more, f"first_stage_from={first_stage}"))
    (tmp_path / "base" / "model" / "model.json").unlink()
    other = changed(first_stage, tmp_path / "other")
    with pytest.raises(UserError, match=rf"another latent_diffusion\.first_stage: then .*{first_stage}; now .*{other}"):
        curriculum.run(*launch(tiny_shapes, tmp_path, *more, f"first_stage_from={other}"))
