"""Cached latents: written once, in shares, in whole shards, and read with a variant of its own at every visit."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torch import Tensor

from ldm.data.loading.cache import Encoders, ShardPartition, write_latents
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.latents import LatentRecord, LatentSource, pack, read_record, summary, unpack
from ldm.data.loading.shard_source import ShardSource
from ldm.data.order.buckets import Sizes
from ldm.data.shards.picture import BadSample
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data import make


def encode(images: Tensor) -> Tensor:
    """The mean of 4 x 4 pixels, and a std that the mean tells."""
    mean = torch.nn.functional.avg_pool2d(images, 4)
    return torch.stack([mean, mean.abs() + 0.5], dim=1)


def record(source: ShardSource, size: int = 16, variants: int = 1, first_stage: str = "a" * 16) -> LatentRecord:
    fingerprint = source.manifest().fingerprint
    return LatentRecord(
        first_stage, fingerprint, ((size, size),), source.where, "exact", variants, source.random_crop, source.flip, 5
    )


def write(source: ShardSource, out: Path, variants: int = 1, partition: ShardPartition | None = None) -> LatentSource:
    return write_latents(
        source, record(source, variants=variants), Encoders(encode), out, partition or ShardPartition(), progress=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_latents_stand_in_the_pictures_place_with_their_text_and_json(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 25, size=(40, 20)))
    cached = write(source, tmp_path / "latents")
    pictures = source.fetcher(source.manifest(), [(16, 16)], 0)
    latents = cached.fetcher(cached.manifest(), [(16, 16)], 0)
    for index in range(25):
        true, made = pictures(index), latents(index)
        wanted = encode(true.image[None])[0].half().numpy()
        assert made.moments is not None and np.array_equal(made.moments, wanted)
        assert (made.caption, made.original_size, made.crop) == (true.caption, true.original_size, true.crop)
        assert made.crop != (0, 0)
        assert json.loads(latents.parts(index)["json"])["width"] == 40
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text())
    assert (facts["samples"], facts["left_out"], facts["finished"]) == (25, 0, True)
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "latents").glob("*.tar"))
    each = facts["bytes"] / 25
    assert f"25 samples of {each:.0f} bytes, 0 left out; {facts['pictures_per_second']}" in summary(
        tmp_path / "latents"
    )


def test_webdataset_reads_them(tmp_path: Path) -> None:
    write(ShardSource(make.shards(tmp_path / "pictures", 5)), tmp_path / "latents")
    read = list(webdataset.WebDataset(str(tmp_path / "latents/000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [f"{i:06d}" for i in range(5)]
    assert unpack(read[3]["latents.safetensors"])["moments"].shape == (1, 2, 3, 4, 4)
    assert read[3]["txt"] == "picture 3"


def test_shares_and_an_interruption_give_the_same_bytes(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 35))
    write(source, tmp_path / "whole")
    halves = tmp_path / "halves"
    other = threading.Thread(target=write, args=(source, halves), kwargs={"partition": ShardPartition(1, 2, batch=3)})
    other.start()
    write(source, halves, partition=ShardPartition(0, 2, batch=7))
    other.join()
    assert contents(halves) == contents(tmp_path / "whole")

    facts = json.loads((halves / "latents.json").read_text())
    (halves / "latents.json").write_text(json.dumps(facts | {"finished": False}))
    (halves / "000002.tar").unlink()
    kept = (halves / "000001.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="not complete"):
        LatentSource(str(halves)).manifest()
    write(source, halves)
    assert contents(halves) == contents(tmp_path / "whole")
    assert (halves / "000001.tar").stat().st_mtime_ns == kept


def test_a_visit_draws_one_of_the_variants_and_each_is_what_the_picture_gives(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 10, size=(40, 24)), random_crop=True, flip=True)
    cached = write(source, tmp_path / "latents", variants=4)
    pictures = source.fetcher(source.manifest(), [(16, 16)], 5)
    latents = cached.fetcher(cached.manifest(), [(16, 16)], 9)
    for index in range(10):
        variants = [encode(pictures(index, v).image[None])[0].half().numpy() for v in range(4)]
        crops = [pictures(index, v).crop for v in range(4)]
        seen = set()
        for epoch in range(24):
            made = latents(index, epoch)
            which = [v for v in range(4) if np.array_equal(made.moments, variants[v])]  # type: ignore[arg-type]
            assert which and made.crop in [crops[v] for v in which]
            seen.update(which)
        assert seen == {0, 1, 2, 3}


def test_the_datamodule_gives_batches_of_moments(tmp_path: Path) -> None:
    cached = write(ShardSource(make.shards(tmp_path / "pictures", 12)), tmp_path / "latents")
    data = ShardDataModule(cached, cached, 16, 4, total_steps=6)
    data.prepare_data()
    data.setup()
    batches = list(data.train_dataloader())
    assert [batch.moments.shape for batch in batches if batch.moments is not None] == [(4, 2, 3, 4, 4)] * 6
    assert batches[0].images.shape == (4, 0, 16, 16)
    assert sorted(torch.cat([batch.samples for batch in batches[:3]]).tolist()) == list(range(12))


def test_another_first_stage_is_refused(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 4))
    cached = write(source, tmp_path / "latents")
    data = ShardDataModule(cached, None, 16, 4, total_steps=1)
    data.check_first_stage("a" * 16)
    with pytest.raises(UserError, match=r"made by the first stage a+, this one is b+"):
        data.check_first_stage("b" * 16)
    with pytest.raises(UserError, match="on pictures"):
        data.check_first_stage(None)
    with pytest.raises(UserError, match=r"of the first stage a+, this one is b+"):
        write_latents(
            source, record(source, first_stage="b" * 16), Encoders(encode), tmp_path / "latents", ShardPartition()
        )


def test_other_sizes_and_folders_are_refused(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 4))
    cached = write(source, tmp_path / "latents")
    with pytest.raises(UserError, match=r"16x16, none of 32x32"):
        cached.fetcher(cached.manifest(), [(32, 32)], 0)
    with pytest.raises(UserError, match="other latents"):
        write_latents(source, record(source, size=32), Encoders(encode), tmp_path / "latents", ShardPartition())
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text())
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(facts | {"finished": False}))
    with pytest.raises(UserError, match=r"other latents \(sizes \[\[16, 16\]\], wanted \[\[32, 32\]\]\)"):
        write_latents(source, record(source, size=32), Encoders(encode), tmp_path / "latents", ShardPartition())
    with pytest.raises(UserError, match="no cached latents"):
        LatentSource(str(tmp_path / "pictures")).manifest()
    assert record(source).name != record(source, size=32).name


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_cut_latents_are_a_bad_sample(cut: int) -> None:
    data = pack({"moments": np.zeros((1, 2, 1, 1, 1), np.float16)})
    assert unpack(data)["moments"].shape == (1, 2, 1, 1, 1)
    with pytest.raises(BadSample, match="corrupt latents"):
        unpack(data[:cut])


def test_a_frozen_crop_is_refused() -> None:
    with pytest.raises(UserError, match="freeze"):
        LatentRecord("a", "b", ((16, 16),), variants=1, random_crop=True)
    with pytest.raises(UserError, match="all be the same"):
        LatentRecord("a", "b", ((16, 16),), variants=3)


def test_bad_pictures_are_left_out_counted_and_too_many_stop_it(tmp_path: Path) -> None:
    def broken(bad: set[int], count: int) -> ShardSource:
        folder = tmp_path / f"pictures{len(bad)}"
        samples = [
            (key, parts | ({"png": b"x"} if int(key) in bad else {})) for key, parts in map(make.sample, range(count))
        ]
        write_shard(folder / "0.tar", samples)
        return ShardSource(str(folder))

    cached = write(broken({3, 17}, 30), tmp_path / "latents")
    manifest = cached.manifest()
    assert {manifest.key(i) for i in range(len(manifest))} == {f"{i:06d}" for i in range(30)} - {"000003", "000017"}
    told = json.loads((tmp_path / "latents" / "000000.left_out.json").read_text())
    assert told == [{"key": f"{i:06d}", "reason": "corrupt picture"} for i in (3, 17)]
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["left_out"] == 2
    with pytest.raises(UserError, match="11 of 30 pictures"):
        write(broken(set(range(11)), 30), tmp_path / "other")


def test_an_unreadable_record_is_told(tmp_path: Path) -> None:
    cached = write(ShardSource(make.shards(tmp_path / "pictures", 4)), tmp_path / "latents")
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text())
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_record(Path(cached.shards))


def test_states_of_captions_are_kept_and_the_one_that_is_chosen_comes_back(tmp_path: Path) -> None:
    def texts(captions: list[str]) -> dict[str, Tensor]:
        return {"text-x.tokens": torch.tensor([[[float(len(c)), float(ord(c[-1]))]] for c in captions])}

    source = ShardSource(make.shards(tmp_path / "pictures", 12))
    wanted = replace(record(source), texts=("text-x",))
    cached = write_latents(
        source, wanted, Encoders(encode, texts), tmp_path / "latents", ShardPartition(batch=5), progress=False
    )
    assert read_record(tmp_path / "latents").texts == ("text-x",)
    data = ShardDataModule(cached, None, 16, 6, total_steps=2)
    data.prepare_data()
    data.setup()
    for batch in data.train_dataloader():
        captions, states = batch.fields["caption"], batch.fields["text-x.tokens"]
        assert isinstance(states, Tensor) and states.dtype == torch.float16
        assert states.tolist() == [[[float(len(c)), float(ord(c[-1]))]] for c in captions]


def test_every_caption_that_a_visit_may_draw_has_its_states(tmp_path: Path) -> None:
    def texts(captions: list[str]) -> dict[str, Tensor]:
        return {"x": torch.tensor([[float(len(caption))] for caption in captions])}

    samples = [
        (key, parts | {"json": json.dumps({"alt": [f"{key} one", f"{key} the other"]}).encode()})
        for key, parts in map(make.sample, range(8))
    ]
    write_shard(tmp_path / "pictures" / "0.tar", samples)
    source = ShardSource(str(tmp_path / "pictures"), captions={"txt": 1, "json.alt": 2, "empty": 1})
    wanted = replace(record(source), texts=("x",), captions=("empty", "json.alt", "txt"))
    cached = write_latents(
        source, wanted, Encoders(encode, texts), tmp_path / "latents", ShardPartition(), progress=False
    )
    latents = cached.fetcher(cached.manifest(), [(16, 16)], 3)
    seen = set()
    for epoch in range(40):
        made = latents(2, epoch)
        assert made.texts["x"].tolist() == [len(made.caption)]
        seen.add(made.caption)
    assert seen == {"", "picture 2", "000002 one", "000002 the other"}


def test_a_caption_that_was_not_encoded_is_refused(tmp_path: Path) -> None:
    source = ShardSource(make.shards(tmp_path / "pictures", 4))
    wanted = replace(record(source), texts=("x",))
    encoders = Encoders(encode, lambda captions: {"x": torch.zeros(len(captions), 1)})
    cached = write_latents(source, wanted, encoders, tmp_path / "latents", ShardPartition(), progress=False)
    latents = replace(cached, captions={"empty": 1}).fetcher(cached.manifest(), [(16, 16)], 3)
    with pytest.raises(UserError, match="was not encoded"):
        latents(0)


def of_shapes(folder: Path, sizes: list[tuple[int, int]]) -> ShardSource:
    """Pictures of (width, height) in shards of seven; `score` is their number."""
    samples = []
    for number, (width, height) in enumerate(sizes):
        key, parts = make.sample(number, (width, height))
        samples.append((key, parts | {"json": json.dumps({"score": number}).encode()}))
    for start in range(0, len(samples), 7):
        write_shard(folder / f"{start:03d}.tar", samples[start : start + 7])
    return ShardSource(str(folder), where="score >= 4 and score < 40")


def test_buckets_and_filters_give_the_batches_that_the_pictures_give(tmp_path: Path) -> None:
    shapes = [(40, 20), (20, 40), (24, 24)]
    source = of_shapes(tmp_path / "pictures", [shapes[i % 3] for i in range(44)])
    buckets = Sizes([[8, 16], [16, 8], [12, 12]])

    def data(train: ShardSource | LatentSource) -> ShardDataModule:
        return ShardDataModule(train, None, 16, 5, total_steps=12, seed=3, buckets=buckets)

    pictures = data(source)
    pictures.setup()
    _, (chosen,) = pictures.select([source.manifest()])
    wanted = replace(record(source), sizes=tuple(pictures.used_sizes))
    out = tmp_path / "latents"
    cached = write_latents(source, wanted, Encoders(encode), out, ShardPartition(batch=4), chosen, progress=False)
    assert len(cached.manifest()) == 36
    latents = data(cached)
    latents.setup()
    assert latents.used_sizes == pictures.used_sizes and latents.plan.samples.tolist() == pictures.plan.samples.tolist()
    seen = set()
    for batch in latents.train_dataloader():
        size = (batch.images.shape[2], batch.images.shape[3])
        seen.add(size)
        assert batch.moments is not None
        for index, moments in zip(batch.samples.tolist(), batch.moments, strict=True):
            key = cached.manifest().key(index)
            picture = pictures.train_fetcher(int(key), size=size)
            assert torch.equal(moments, encode(picture.image[None])[0].half())
    assert seen == set(pictures.used_sizes)
    with pytest.raises(UserError, match="none of 16x16"):
        ShardDataModule(cached, None, 16, 5, total_steps=1).setup()
    moved = ShardDataModule(cached, None, 16, 5, total_steps=12, buckets=Sizes([[8, 16], [12, 12]]))
    moved.setup()
    with pytest.raises(UserError, match="its bucket is"):
        list(moved.train_dataloader())
