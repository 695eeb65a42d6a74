import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.data.loading.batch import Batch
from ldm.data.loading.datamodule import ShardDataModule
from ldm.data.loading.shard_source import ShardSource
from ldm.data.shards.write import write_shard
from ldm.errors import UserError
from tests.data.make import sample, shards

STEPS = 10


class Tiny(pl.LightningModule):
    """A module whose weights depend on every image and on the order; it notes what it saw."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.other = torch.nn.Linear(3, 1)
        self.automatic_optimization = not manual
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[list[int]] = []

    def loss(self, batch: Batch) -> torch.Tensor:
        return (self.layer(batch.images.mean((2, 3))) - 0.3 * (batch.step + 1)).square().mean()

    def training_step(self, batch: Batch) -> torch.Tensor | None:
        self.seen.append((batch.step, batch.samples.tolist()))
        if self.automatic_optimization:
            return self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) + self.other(batch.images.mean((2, 3))).square().mean())
            optimizer.step()
        return None

    def validation_step(self, batch: Batch) -> None:
        self.validated.append(batch.samples.tolist())

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.layer.parameters(), lr=0.1)
        return first if self.automatic_optimization else [first, torch.optim.SGD(self.other.parameters(), lr=0.1)]


class Keeper(pl.Callback):
    """Advances the data with the optimizer; stops and saves as on a signal, after so many batches."""

    def __init__(self, checkpoint: Path, stop_after: int) -> None:
        self.checkpoint = checkpoint
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.datamodule.advance(batch.step + 1)
        if batch_idx + 1 == self.stop_after:
            trainer.should_stop = True
            trainer.save_checkpoint(self.checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shards(tmp_path_factory.mktemp("shards"), 30)


def data(folder: str, **changed: Any) -> ShardDataModule:
    settings: dict[str, Any] = {"size": 16, "global_batch": 8, "total_steps": STEPS, "seed": 3}
    return ShardDataModule(ShardSource(folder), None, **(settings | changed))


def fit(
    datamodule: ShardDataModule,
    module: Tiny,
    stopped: Path,
    resume: Path | None = None,
    stop: int = -1,
    **options: Any,
) -> Tiny:
    """Trains and returns the module; `stop` batches later it stops and saves to `stopped`."""
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Keeper(stopped, stop)],
        **options,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
    return module


def seen_steps(module: Tiny) -> list[int]:
    return [step for step, _ in module.seen]


def same_weights(a: Tiny, b: Tiny) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return tmp_path / "stopped.ckpt"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(folder: str, stopped: Path, workers: int) -> None:
    whole = fit(data(folder), Tiny(), stopped)
    assert seen_steps(whole) == list(range(STEPS))
    part = fit(data(folder, workers=workers), Tiny(), stopped, stop=4)
    assert part.seen == whole.seen[:4]
    rest = fit(data(folder, workers=workers), Tiny(), stopped, resume=stopped)
    assert rest.seen == whole.seen[4:]
    assert same_weights(rest, whole) and not same_weights(part, whole)


def test_two_optimizers_count_one_step(folder: str, stopped: Path) -> None:
    whole = fit(data(folder), Tiny(manual=True), stopped)
    fit(data(folder), Tiny(manual=True), stopped, stop=3)
    rest = fit(data(folder), Tiny(manual=True), stopped, resume=stopped)
    assert rest.seen == whole.seen[3:] and same_weights(rest, whole)


@pytest.mark.parametrize("stop", [4, 5])
def test_accumulated_steps_resume_whole(folder: str, stopped: Path, stop: int) -> None:
    """Also after a stop in the middle of a step, which is then done again from its beginning."""
    whole = fit(data(folder), Tiny(), stopped, accumulate_grad_batches=2)
    assert seen_steps(whole) == [step for step in range(STEPS) for _ in range(2)]
    fit(data(folder), Tiny(), stopped, stop=stop, accumulate_grad_batches=2)
    rest = fit(data(folder), Tiny(), stopped, resume=stopped, accumulate_grad_batches=2)
    assert rest.seen == whole.seen[4:] and same_weights(rest, whole)


def test_a_run_resumes_with_another_number_of_micro_steps(folder: str, stopped: Path) -> None:
    whole = fit(data(folder), Tiny(), stopped)
    fit(data(folder), Tiny(), stopped, stop=4)
    rest = fit(data(folder), Tiny(), stopped, resume=stopped, accumulate_grad_batches=4)
    assert seen_steps(rest) == [step for step in range(4, STEPS) for _ in range(4)]
    joined = [list(chain(*(ids for _, ids in rest.seen[i : i + 4]))) for i in range(0, len(rest.seen), 4)]
    assert joined == [ids for _, ids in whole.seen[4:]]
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"global_batch": 4}, {"window": 7}])
def test_another_order_is_refused_at_resume(folder: str, stopped: Path, changed: dict[str, int]) -> None:
    fit(data(folder), Tiny(), stopped, stop=2)
    with pytest.raises(UserError, match=f"another order of samples: {next(iter(changed))}"):
        fit(data(folder, **changed), Tiny(), stopped, resume=stopped)


def test_other_samples_are_refused_at_resume(folder: str, tmp_path: Path, stopped: Path) -> None:
    fit(data(folder), Tiny(), stopped, stop=2)
    with pytest.raises(UserError, match="another order of samples: fingerprint"):
        fit(data(shards(tmp_path / "s", 31)), Tiny(), stopped, resume=stopped)


def test_training_that_never_advances_is_told(folder: str, stopped: Path) -> None:
    datamodule = data(folder)
    datamodule.advance = lambda steps: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"must call datamodule\.advance"):
        fit(datamodule, Tiny(), stopped, stop=2)


def test_validation_runs_on_its_fixed_batches(folder: str, tmp_path: Path) -> None:
    held_out = shards(tmp_path / "val", 7)
    datamodule = ShardDataModule(ShardSource(folder), ShardSource(held_out), 16, 4, 4, val_samples=6)
    module = fit(datamodule, Tiny(), tmp_path / "run", num_sanity_val_steps=0, val_check_interval=2)
    assert module.validated == [[0, 1, 2, 3], [4, 5]] * 2


def test_bad_samples_are_counted_and_end_the_run_when_many(tmp_path: Path) -> None:
    broken = [(f"broken{i}", {"png": b"", "txt": b"words"}) for i in range(5)]
    write_shard(tmp_path / "s" / "a.tar", [*broken, *(sample(i) for i in range(20))])
    datamodule = data(str(tmp_path / "s"), max_bad=0.9)
    fit(datamodule, Tiny(), tmp_path / "run")
    assert datamodule.quarantine.seen == 80 and 10 < datamodule.quarantine.bad < 40
    with pytest.raises(UserError, match=r"(?s)could not be used.*a.tar: 1[1-9] x empty picture"):
        fit(data(str(tmp_path / "s")), Tiny(), tmp_path / "again")


def test_settings_that_cannot_be_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="total_steps"):
        data(folder, total_steps=0)
    with pytest.raises(UserError, match="multiple of 3"):
        fit(data(folder), Tiny(), tmp_path, accumulate_grad_batches=3)
    with pytest.raises(UserError, match="the data accumulates 2 micro-steps, the Trainer 1"):
        fit(data(folder, accumulation=2), Tiny(), tmp_path)
    alone = data(folder)
    alone.setup()
    with pytest.raises(UserError, match="no validation shards"):
        alone.val_batches()


def test_two_processes_share_the_global_batches(folder: str, tmp_path: Path) -> None:
    """Under Lightning's ddp, with its sampler replacement left on."""
    torch.multiprocessing.start_processes(_rank, (folder, str(tmp_path)), nprocs=2, start_method="fork")
    alone = fit(data(folder), Tiny(), tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    joined = [first[1] + second[1] for first, second in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert joined == [ids for _, ids in alone.seen]
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value)


def _rank(rank: int, folder: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2"}
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "x",
    }
    torch.set_num_threads(1)
    module = fit(data(folder), Tiny(), Path(out) / "runs", devices=2, strategy="ddp_find_unused_parameters_true")
    torch.save({"seen": module.seen, "weights": module.state_dict()}, f"{out}/rank{rank}.pt")


def test_data_without_training_shards_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match="no training shards; give train"):
        ShardDataModule(None, ShardSource(folder), 16, 4, 4).prepare_data()
