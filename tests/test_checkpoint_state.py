"""Checkpoint folders: a nested state comes back as it was, torn and damaged ones are known, the newest is found."""

import json
import math
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm import checkpoint
from ldm.errors import UserError

FILES = {"model": "model", "callbacks/EMA/average": "ema"}


def same(a: Any, b: Any) -> bool:
    """Equal in types, structure, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return alike and checkpoint.fingerprint({"": a}) == checkpoint.fingerprint({"": b})
    if isinstance(a, dict):
        return same(list(a), list(b)) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def through(folder: Path, state: Any) -> Any:
    checkpoint.save_state(folder / "step=1", state, FILES)
    return checkpoint.load_state(folder / "step=1")


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def some_tensor(draw: random.Random) -> Tensor:
    shape = [draw.randint(0, 3) for _ in range(draw.randint(0, 4))]
    tensor = torch.randint(0, 2, shape).to(draw.choice(TYPES))
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 and draw.random() < 0.5 else tensor


def some_state(draw: random.Random, depth: int) -> Any:
    """A state drawn at random: every type, strange names, numbers that JSON does not have."""
    leaves: list[Any] = [
        None, True, False, 0, -(10**30), 0.1, -0.0, 5e-324, math.nan, math.inf, -math.inf, "", "$tensor", "a/b", "ü\n",
    ]  # fmt: skip
    kind = draw.randrange(6 if depth else 2)
    if kind == 0:
        return draw.choice(leaves)
    if kind == 1:
        return some_tensor(draw)
    items = [some_state(draw, depth - 1) for _ in range(draw.randint(0, 4))]
    names: list[Any] = ["", "a", "a/b", "b", "$tensor", "$tuple", "__metadata__", 0, -7, 2.5, math.inf, None, "0", "ü"]
    if draw.random() < 0.5:
        names = [name for name in names if isinstance(name, str)]
    return [items, tuple(items), dict(zip(draw.sample(names, len(items)), items, strict=True)), items][kind - 2]


def test_any_nested_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for seed in range(60):
        state = {"model": some_state(random.Random(seed), 3), "rest": some_state(random.Random(1000 + seed), 4)}
        assert same(through(tmp_path, state), state), seed


def test_names_that_would_be_one_in_a_file_stay_apart(tmp_path: Path) -> None:
    state = {"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1), "value": torch.ones(2), "__metadata__": torch.ones(3)}
    assert same(through(tmp_path, state), state)


def test_an_optimizers_state_comes_back(tmp_path: Path) -> None:
    """The stride as well: fused AdamW goes through the memory of weight, gradient and averages side by side."""
    network = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    network(torch.randn(2, 4, 5, 5)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state["state"]) == [0, 1] and type(state["param_groups"][0]["betas"]) is tuple
    assert state["state"][0]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert same(through(tmp_path, state), state)


def test_tensors_lie_in_their_files_under_their_names(tmp_path: Path) -> None:
    state = {
        "model": {"net.weight": torch.ones(2)},
        "callbacks": {"EMA": {"average": {"net.weight": torch.zeros(2)}, "updates": 3}},
        "optimizer": [torch.ones(())],
    }
    assert same(through(tmp_path, state), state)
    folder = tmp_path / "step=1"
    held = {path.name: list(checkpoint.load_tensors(path)[0]) for path in folder.glob("*.safetensors")}
    assert held == {
        "model.safetensors": ["net.weight"],
        "ema.safetensors": ["net.weight"],
        "tensors.safetensors": ["optimizer/0"],
    }
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["files"].keys() == {*held, "state.json"}
    assert all(fact["sha256"] == checkpoint.sha256(folder / name) for name, fact in record["files"].items())


def test_shared_tensors_are_written_once_and_shared_again(tmp_path: Path) -> None:
    tied = torch.randn(100, 100)
    state = {"model": {"in": tied, "out": tied, "part": tied[:2]}, "more": [tied.detach()]}
    loaded = through(tmp_path, state)
    assert loaded["model"]["in"] is loaded["model"]["out"] is loaded["more"][0]
    assert torch.equal(loaded["model"]["part"], tied[:2]) and torch.equal(loaded["model"]["in"], tied)
    assert (tmp_path / "step=1" / "model.safetensors").stat().st_size < 1.5 * tied.nbytes


def test_parameters_and_ordered_dicts_become_tensors_and_dicts(tmp_path: Path) -> None:
    loaded = through(tmp_path, OrderedDict(w=torch.nn.Parameter(torch.ones(2))))
    assert type(loaded) is dict and type(loaded["w"]) is Tensor


@pytest.mark.parametrize(
    "thing", [object(), {1, 2}, b"bytes", torch.float32, Path("x"), torch.Size([2]), torch.eye(2).to_sparse()]
)
def test_anything_else_is_refused_where_it_stands(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(UserError, match="at callbacks/mine/0: a checkpoint keeps"):
        checkpoint.save_state(tmp_path / "step=1", {"callbacks": {"mine": [thing]}})
    with pytest.raises(UserError, match="tuple as key"):
        checkpoint.save_state(tmp_path / "step=1", {(1, 2): 3})
    assert not list(tmp_path.iterdir())


def make(folder: Path, *names: str) -> None:
    for time, name in enumerate(names):
        checkpoint.save_state(folder / name, {"w": torch.full((100,), float(time)), "time": time})
        os.utime(folder / name, (time, time))


def flip(path: Path) -> None:
    """Damages one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_byte_is_found_when_loading(tmp_path: Path, file: str) -> None:
    make(tmp_path, "step=1")
    flip(tmp_path / "step=1" / file)
    assert checkpoint.is_whole(tmp_path / "step=1")
    with pytest.raises(UserError, match=f"step=1 is damaged: its file {file}"):
        checkpoint.load_state(tmp_path / "step=1")


def tear(folder: Path, how: str) -> None:
    """A checkpoint as an interrupted copy leaves it."""
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "record cut":
        text = (folder / "checkpoint.json").read_text()
        (folder / "checkpoint.json").write_text(text[: len(text) // 2])
    elif how == "tensors cut":
        os.truncate(folder / "tensors.safetensors", 100)
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    "how", ["empty", "record cut", "tensors cut", "tensors.safetensors", "state.json", "checkpoint.json"]
)
def test_torn_checkpoints_are_skipped_and_refused(tmp_path: Path, how: str) -> None:
    make(tmp_path, "step=1", "step=2")
    tear(tmp_path / "step=2", how)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step=1"
    with pytest.raises(UserError, match=r"step=2 is (damaged|no checkpoint)"):
        checkpoint.load_state(tmp_path / "step=2")


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_bytes(b"PK")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    for name, message in (("file.ckpt", "it is a file"), ("model", "no checkpoint.json"), ("absent", "nothing is")):
        with pytest.raises(UserError, match=message):
            checkpoint.load_state(tmp_path / name)
    assert checkpoint.find_latest(tmp_path) is None and checkpoint.find_latest(tmp_path / "absent") is None
    make(tmp_path, "step=1")
    record = tmp_path / "step=1" / "checkpoint.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="of format 99"):
        checkpoint.load_state(tmp_path / "step=1")


def test_an_error_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, "step=1")
    with pytest.raises(ZeroDivisionError), checkpoint.write_folder(tmp_path / "step=1") as temporary:
        (temporary / "checkpoint.json").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["step=1"]
    assert checkpoint.load_state(tmp_path / "step=1")["time"] == 0


def test_a_folder_is_replaced_and_leftovers_of_its_name_go(tmp_path: Path) -> None:
    make(tmp_path, "step=1", "step=10")
    for left in (".step=1.0a1b2c3d.tmp", ".step=10.0a1b2c3d.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "tensors.safetensors").write_bytes(b"half")
    checkpoint.save_state(tmp_path / "step=1", {"time": 5})
    assert checkpoint.load_state(tmp_path / "step=1") == {"time": 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step=10.0a1b2c3d.tmp", "step=1", "step=10"]


def test_every_byte_is_on_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def named(source: Path, target: Path) -> None:
        if Path(target).name == "step=1":
            assert {"state.json", "checkpoint.json", Path(source).name} <= synced
            assert any(name.startswith(".tensors.safetensors") or name == "tensors.safetensors" for name in synced)
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", named)
    checkpoint.save_state(tmp_path / "step=1", {"w": torch.ones(3)})
    assert synced == {tmp_path.name}


def test_the_newest_is_by_number_whatever_the_copy_order(tmp_path: Path) -> None:
    make(tmp_path, "epoch=1-step=1000", "epoch=0-step=900", "epoch=0-step=90")
    steps = [path.name.split("=")[-1] for path in checkpoint.checkpoints(tmp_path)]
    assert steps == ["1000", "900", "90"]


def test_the_newest_is_by_time_where_a_name_has_no_number(tmp_path: Path) -> None:
    make(tmp_path, "step=5", "last", "step=4")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step=4", "last", "step=5"]


def test_keep_last_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    make(tmp_path, *[f"step={step}" for step in (1, 2, 3, 10, 11)], "other")
    tear(tmp_path / "step=11", "tensors cut")
    (tmp_path / ".step=12.0a1b2c3d.tmp").mkdir()  # a killed writer's, older than the newest
    os.utime(tmp_path / ".step=12.0a1b2c3d.tmp", (0, 0))
    checkpoint.keep_last(tmp_path, 2, "step=*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step=10", "step=11", "step=3"]
    with pytest.raises(UserError, match="at least one"):
        checkpoint.keep_last(tmp_path, 0)
