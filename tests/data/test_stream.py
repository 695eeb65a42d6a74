"""Streams: webdataset's pipeline into our batches."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.loading import stream as stream_module
from ldm.data.loading.fetch import View, as_images
from ldm.data.loading.loader import StepLoader
from ldm.data.loading.quarantine import Skipped
from ldm.data.loading.shard_source import ShardSource
from ldm.data.loading.stream import StreamBatches, StreamDataModule, StreamSource, caption_of
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import sample, shards


def batches(source: StreamSource, rank: int = 0, world: int = 1, start: int = 0, seed: int = 0) -> StreamBatches:
    return StreamBatches(source, View.of(8), seed, 8, 5, rank, world, 1, start)


def ids(found: StreamBatches, count: int = 5) -> list[int]:
    return [number for i in range(count) for number in found[i].samples.tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shards(tmp_path_factory.mktemp("s"), 200, per_shard=20, size=(10, 12))


def test_a_command_gives_batches(folder: str) -> None:
    source = StreamSource(f"pipe:cat {folder}/{{00000..00003}}.tar", buffer=30)
    assert len(source.paths()) == 4 and len(batches(source)) == 5
    batch = batches(source)[3]
    assert batch.images.shape == (8, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.images.abs().max() <= 1
    assert batch.step == 3 and batch.positions.tolist() == list(range(8)) and batch.bad == []
    assert all(caption.startswith("picture ") for caption in batch.fields["caption"])
    assert batch.original_size.tolist() == [[12, 10]] * 8


def test_the_pixels_are_those_of_the_caption(folder: str) -> None:
    source = StreamSource(folder, buffer=30)
    found = StreamBatches(source, View.of((12, 10)), 0, 4, 1)[0]
    for image, caption in zip(found.images, found.fields["caption"], strict=True):
        stored = sample(int(caption.split()[1]), (10, 12))[1]["png"]
        pixels, _ = stream_module.decode(stored, (12, 10))
        assert torch.equal(image, as_images(pixels[None])[0])


def test_ranks_seeds_and_starts_have_streams_of_their_own(folder: str) -> None:
    source = StreamSource(folder, buffer=30)
    base = ids(batches(source))
    assert ids(batches(source)) == base
    others = [batches(source, start=2), batches(source, seed=1), batches(source, rank=0, world=2)]
    assert all(ids(other) != base for other in others[:2])
    zero, one = (ids(batches(source, rank=rank, world=2)) for rank in (0, 1))
    assert zero[:10] != one[:10] and len(zero) == len(one) == 20
    positions = [batches(source, rank=rank, world=2)[0].positions.tolist() for rank in (0, 1)]
    assert positions == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_noise_has_the_addresses_of_indexed_shards(folder: str) -> None:
    whole = batches(StreamSource(folder, buffer=30))[1].rng_keys.tolist()
    halves = [batches(StreamSource(folder, buffer=30), rank=rank, world=2)[1].rng_keys.tolist() for rank in (0, 1)]
    assert halves[0] + halves[1] == whole


def test_workers_have_streams_of_their_own(folder: str) -> None:
    loader: DataLoader = StepLoader(batches(StreamSource(folder, buffer=30)), workers=2)
    found = [batch.samples.tolist() for batch in loader]
    assert len(found) == 5 and found[0] != found[1]


def test_samples_are_mixed(folder: str) -> None:
    found = ids(batches(StreamSource(f"{folder}/00000.tar", buffer=20)), 2)
    in_order = ids(batches(StreamSource(f"{folder}/00000.tar", buffer=1)), 2)
    assert found != in_order and set(found[:4]) <= set(in_order + found)


def test_bad_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    bad = [("a", {"png": b"", "txt": b"x"}), ("b", {"txt": b"x"}), ("c", {"png": b"xx", "txt": b"x"})]
    write_shard(tmp_path / "0.tar", [*bad, *(sample(i) for i in range(40)), ("d", {"png": sample(0)[1]["png"]})])
    found = batches(StreamSource(tmp_path, buffer=44))
    noted = [entry for i in range(5) for entry in found[i].bad] + found._bad
    reasons = {reason for _, reason in noted}
    assert reasons <= {"empty picture", "no picture", "corrupt picture", "no caption"} and len(reasons) >= 3
    free = batches(StreamSource(tmp_path, buffer=44, require_caption=False))
    assert "no caption" not in {reason for i in range(5) for _, reason in free[i].bad}


def test_a_torn_shard_gives_its_whole_samples(tmp_path: Path) -> None:
    folder = Path(shards(tmp_path, 20, per_shard=20))
    path = folder / "00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"picture 7") + 3])
    source = StreamSource(folder, buffer=1)
    noted: list[tuple[int, str]] = []
    drawn = stream_module.stream(source, source.paths(), 0, noted)
    found = [next(drawn)[1]["__key__"] for _ in range(15)]
    assert found == [f"{i:06d}" for i in range(7)] * 2 + ["000000"] and (0, "torn shard") in noted


@pytest.mark.parametrize("command", ["pipe:false", "pipe:echo nothing"])
def test_streams_of_nothing_stop(command: str) -> None:
    with pytest.raises(UserError, match="10 shards in a row gave no sample"):
        batches(StreamSource(command))[0]


def test_samples_that_are_all_bad_stop(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [(f"{i}", {"png": b"", "txt": b"x"}) for i in range(30)])
    with pytest.raises(UserError, match="10 samples in a row cannot be used"):
        batches(StreamSource(tmp_path))[0]


def test_too_many_bad_samples_stop_the_run(folder: str) -> None:
    batch = batches(StreamSource(folder, buffer=10))[0]
    count = Skipped(["a.tar"], limit=0.01, minimum=2)
    count.add(batch._replace(bad=[(0, "torn shard")] * 2))
    with pytest.raises(UserError, match=r"3 of 19 samples could not be used.*\n  a.tar: 2 x torn shard"):
        count.add(batch._replace(bad=[(0, "no caption")]))


def test_captions_come_from_text_then_json() -> None:
    assert caption_of({"txt": b" words ", "json": b'{"caption": "other"}'}, True) == "words"
    assert caption_of({"txt": b"", "json": b'{"caption": "other"}'}, True) == "other"
    assert caption_of({"json": b"no json"}, False) == ""
    for broken, reason in (({}, "no caption"), ({"txt": bytes(2 << 20)}, "too many bytes")):
        with pytest.raises(stream_module.BadSample, match=reason):
            caption_of(broken, True)


def test_crops_and_flips_follow_the_draw() -> None:
    pixels = torch.arange(6 * 9 * 3, dtype=torch.uint8).view(6, 9, 3).numpy()
    centre, at = View((6, 5)).crop(pixels, (6, 5), 123)
    assert at == (0, 2) and (centre == pixels[:, 2:7]).all()
    places = {View((6, 5), random_crop=True).crop(pixels, (6, 5), 0, draw)[1] for draw in range(50)}
    assert places == {(0, left) for left in range(5)}
    drawn = [View((6, 9), flip=True).crop(pixels, (6, 9), 0, draw)[0] for draw in range(50)]
    mirrored = sum((found == pixels[:, ::-1]).all() for found in drawn)
    assert 10 < mirrored < 40 and mirrored + sum((found == pixels).all() for found in drawn) == 50


def test_the_datamodule_warns_and_goes_on_at_its_step(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    data = StreamDataModule(StreamSource(folder, buffer=20), ShardSource(folder), 8, 8, 5, val_samples=6)
    data.prepare_data()
    data.setup()
    assert "a resumed run continues with other samples" in caplog.text
    first = [batch.samples.tolist() for batch in data.train_dataloader()]
    assert len(first) == 5 and len(next(iter(data.val_dataloader())).samples) == 6
    data.advance(3)
    again = StreamDataModule(StreamSource(folder, buffer=20), ShardSource(folder), 8, 8, 5)
    again.load_state_dict(data.state_dict())
    again.setup()
    rest = list(again.train_dataloader())
    assert [batch.step for batch in rest] == [3, 4] and rest[0].samples.tolist() not in first
    changed = StreamDataModule(StreamSource(folder), ShardSource(folder), 8, 16, 5)
    changed.load_state_dict(data.state_dict())
    changed.setup()
    with pytest.raises(UserError, match="global_batch 8"):
        changed.train_dataloader()


def test_batches_travel_closed(folder: str) -> None:
    found = batches(StreamSource(folder, buffer=20))
    first = found[0].samples.tolist()
    assert pickle.loads(pickle.dumps(found))[0].samples.tolist() == first


def test_the_shipped_config_fits() -> None:
    from ldm.config.build import build
    from ldm.config.check import check
    from ldm.config.compose import compose

    overrides = ["data=stream", "data.train.shards=pipe:cat a.tar", "data.val.shards=v", "run_folder=x"]
    data = compose("train", [*overrides, "name=x", "trainer.max_steps=3"]).data
    check(data)
    assert isinstance(build(data), StreamDataModule)
