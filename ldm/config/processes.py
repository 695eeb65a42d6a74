"""Several processes, one run: the folder that all ranks agree on, and the processes that Lightning starts for a job."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from ldm.errors import UserError

if TYPE_CHECKING:  # loaded by the ranks of a launch alone, which load them anyway
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from torch._C._distributed_c10d import TCPStore

LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")  # that Lightning sets
PORT_DISTANCE = 10000  # from MASTER_PORT: Lightning gives SLURM's jobs neighbouring ports
WAIT_S = 300.0

_agreed: dict[str, str] = {}
_stores: "list[TCPStore]" = []


def agreed(name: str, value: str) -> str:
    """Rank 0's `value` on every rank that torchrun or SLURM started; elsewhere `value` itself.

    All ranks have to ask for the same name. They agree on it once; the answer is kept.
    """
    cluster = _cluster()
    if cluster is None:
        return value
    if name not in _agreed:
        _agreed[name] = _exchange(cluster, name, value)
    return _agreed[name]


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run, however its processes were started."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def launched() -> tuple[int, int, int]:
    """(rank, world, local rank) of the processes that torchrun or SLURM started; (0, 1, 0) elsewhere."""
    cluster = _cluster()
    return (0, 1, 0) if cluster is None else (cluster.global_rank(), cluster.world_size(), cluster.local_rank())


def _cluster() -> "ClusterEnvironment | None":
    """What started this process, where it started others as well."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        cluster: ClusterEnvironment = TorchElasticEnvironment()
    elif "SLURM_PROCID" in os.environ and SLURMEnvironment.detect():
        cluster = SLURMEnvironment()
    else:
        return None
    return cluster if cluster.world_size() > 1 else None


def _exchange(cluster: "ClusterEnvironment", name: str, value: str) -> str:
    key = f"ldm {name} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    try:
        store = _store(cluster)
        if cluster.global_rank() > 0:
            found = str(store.get(key).decode())
            store.add(f"{key} read", 1)
            return found
        store.set(key, value)
        deadline = time.monotonic() + WAIT_S
        while store.add(f"{key} read", 0) < cluster.world_size() - 1:  # the store ends with this process
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all {cluster.world_size()} ranks have asked within {WAIT_S:.0f} s")
            time.sleep(0.05)
        return value
    except RuntimeError as error:
        raise UserError(
            f"the ranks could not agree on a folder ({str(error).splitlines()[0]}); name it yourself: "
            "hydra.run.dir=FOLDER, the same for all"
        ) from error


def _store(cluster: "ClusterEnvironment") -> "TCPStore":
    """The store of this launch, one for all names: torchrun's, or else rank 0's, which lives as long as that does."""
    if not _stores:
        from torch._C._distributed_c10d import TCPStore

        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        port = cluster.main_port
        if not elastic:
            port += PORT_DISTANCE if port + PORT_DISTANCE < 65536 else -PORT_DISTANCE
        hosting = cluster.global_rank() == 0 and not elastic
        timeout = timedelta(seconds=WAIT_S)
        _stores.append(TCPStore(cluster.main_address, port, is_master=hosting, timeout=timeout, wait_for_workers=False))
    return _stores[0]


def _search_path(hydra: Any) -> list[str]:
    """The arguments that put the user's own config folders on the search path."""
    sources = hydra.runtime.get("config_sources") or ()
    folders = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    return folders + [text for text in hydra.overrides.get("hydra") or () if text.startswith("hydra.searchpath=")]


@contextmanager
def job_processes() -> Iterator[None]:
    """A job, whose further processes get its folder and, in a sweep, its overrides alone; they end with it.

    Lightning starts them with this process's command line. What they have left in this process is cleared, so
    that the next job of a sweep can start its own.
    """
    hydra, argv = HydraConfig.get(), list(sys.argv)
    before = {name: os.environ.get(name) for name in LAUNCHER}
    with read_write(cast(DictConfig, hydra)):
        hydra.run.dir = hydra.runtime.output_dir
    if hydra.mode == RunMode.MULTIRUN:
        sys.argv = [argv[0], *_search_path(hydra), *hydra.overrides.task]
    try:
        yield
    finally:
        sys.argv = argv
        if before["LOCAL_RANK"] is None and "LOCAL_RANK" in os.environ:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
