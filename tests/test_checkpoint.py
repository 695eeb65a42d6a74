"""Files of tensors: whole or absent, refused when unsafe, known by their bytes."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from ldm import checkpoint
from ldm.errors import UserError

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}


def cut(path, share=0.6):
    """The file as a full disk or an interrupted copy leaves it."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(int(size * share))


def temporaries(folder):
    return list(folder.glob(".*"))


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    tied = torch.randn(4)
    tensors = {**TENSORS, "x": tied, "y": tied, "t": TENSORS["b"].T, "scalar": torch.tensor(3.0).bfloat16()}
    checkpoint.save_tensors(path, tensors, {"step": "12"})
    loaded, metadata = checkpoint.load_tensors(path)
    assert metadata == {"step": "12"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["scalar"].dtype == torch.bfloat16


def test_published_weights_of_torch_are_read(tmp_path):
    plain = {"step": 3, "names": ["a", "b"], "lr": 1e-4, "none": None}
    torch.save({"model": TENSORS, "plain": plain}, tmp_path / "x.pth")
    loaded = checkpoint.load_torch(tmp_path / "x.pth")
    assert torch.equal(loaded["model"]["b"], TENSORS["b"])
    assert loaded["plain"] == plain


class Payload:
    """Unpickled without care, it runs a command."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD_FOLDER"],)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "owned"))
    torch.save({"state_dict": TENSORS, "extra": Payload()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="save its weights alone"):
        checkpoint.load_torch(tmp_path / "x.pth")
    assert not (tmp_path / "owned").exists()


def test_damaged_and_foreign_files_are_named(tmp_path):
    weights, state = tmp_path / "w.safetensors", tmp_path / "s.pth"
    for share in (0.9, 0.3, 0.0):
        checkpoint.save_tensors(weights, {"w": torch.zeros(1000)})
        torch.save({"w": torch.zeros(1000)}, state)
        cut(weights, share)
        cut(state, share)
        with pytest.raises(UserError, match=r"w\.safetensors is not a whole"):
            checkpoint.load_tensors(weights)
        with pytest.raises(UserError, match=r"s\.pth"):
            checkpoint.load_torch(state)
    (tmp_path / "text").write_text("hello, this is no checkpoint at all")
    for load in (checkpoint.load_tensors, checkpoint.load_torch):
        with pytest.raises(UserError, match="text"):
            load(tmp_path / "text")
        with pytest.raises(UserError, match="no file at"):
            load(tmp_path / "absent")


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), checkpoint.write_atomic(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert not temporaries(tmp_path)


def test_a_reader_sees_the_old_file_or_the_new_one_and_the_bytes_are_on_disk_first(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    path = tmp_path / "x.txt"
    path.write_text("old")
    with open(path) as reader:
        with checkpoint.write_atomic(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


KILLED = """
import os, signal, sys
from ldm import checkpoint
with checkpoint.write_atomic(sys.argv[1]) as temporary:
    with open(temporary, "wb") as file:
        file.write(b"half of the new")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save_tensors(path, TENSORS)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(temporaries(tmp_path)) == 1  # the write had begun
    assert checkpoint.load_tensors(path)[0].keys() == TENSORS.keys()


def test_the_written_file_has_the_permissions_of_any_new_file(tmp_path):
    checkpoint.save_tensors(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checkpoint.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_fingerprint_depends_on_names_types_shapes_and_bytes_alone():
    base = checkpoint.fingerprint(TENSORS)
    assert len(base) == 16 and int(base, 16) >= 0
    assert checkpoint.fingerprint(dict(reversed(TENSORS.items()))) == base
    trained = {"b": torch.nn.Parameter(TENSORS["b"].clone()), "a": TENSORS["a"]}
    assert checkpoint.fingerprint(trained) == base
    changed = TENSORS["b"].clone()
    changed[1, 2] += 1e-6 * changed[1, 2]
    others = [
        {**TENSORS, "b": changed},
        {**TENSORS, "b": TENSORS["b"].view(3, 2)},
        {**TENSORS, "b": TENSORS["b"].view(torch.int32)},
        {"c": TENSORS["b"], "a": TENSORS["a"]},
        {**TENSORS, "e": torch.zeros(0)},
        {**TENSORS, "s": torch.tensor(True)},
        {**TENSORS, "s": torch.tensor(1.0, dtype=torch.bfloat16)},
    ]
    assert len({base, *map(checkpoint.fingerprint, others)}) == 1 + len(others)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_damaged_bytes_of_a_torch_file_are_told_whatever_they_break(legacy, tmp_path):
    """Texts that are no UTF-8, types that are none, arguments that are missing: torch lets each through as it comes."""
    path, draw = tmp_path / "model.ckpt", random.Random(0)
    state = {"state_dict": {"a": torch.arange(20.0), "b": torch.zeros(2, 3)}, "global_step": 3}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(2, min(len(whole), 900))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint.load_torch(path)
        except UserError:
            refused += 1
    assert refused > 30
