"""Commands: a main function with Hydra's command line in front, and one clear message where it can't go on."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.compose import CONFIGS, completed, compose, first_of_sweeps, register_resolvers, with_texts
from ldm.errors import UserError
from ldm.training.curriculum import Interrupted
from ldm.versions import write_versions

Main = Callable[..., float | None]


@dataclass(frozen=True)
class Invocation:
    """Shim: what a command was called with, its overrides and the folder of its files; sample.py's is given one."""

    overrides: list[str]
    folder: Path




def command(config_name: str, texts: Sequence[str] = ()) -> Callable[[Main], Callable[[], None]]:
    """Makes `main(cfg)` a command line of overrides; a user's error ends it with its message and exit status 1.

    The values of the knobs `texts` are taken as they stand, where it is no sweep.
    """

    def decorate(main: Main) -> Callable[[], None]:
        def guarded(cfg: DictConfig) -> float | None:
            try:
                _write_versions(Path(HydraConfig.get().runtime.output_dir))
                if config_name == "sample":  # shim, see Invocation
                    config = HydraConfig.get()
                    return main(cfg, Invocation(list(config.overrides.task), Path(config.runtime.output_dir)))
                return main(cfg)
            except Interrupted as stop:
                sys.stderr.write(f"{stop}\n")
                raise SystemExit(stop.exit_status) from None
            except Exception as error:
                _exit_if_users(error)
                raise

        def run() -> None:
            register_resolvers()
            _quiet()
            if not {"-m", "--multirun"} & set(sys.argv):
                sys.argv[1:] = with_texts(sys.argv[1:], texts)
            sys.argv[1:] = _completed(config_name, sys.argv[1:])
            overrides = [text for text in sys.argv[1:] if not text.startswith("-")]
            if len(overrides) == len([t for t in sys.argv[1:] if t not in ("-m", "--multirun")]):
                _compose_once(config_name, overrides)
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(guarded)()

        return run

    return decorate


def _completed(config_name: str, arguments: list[str]) -> list[str]:
    """The command line with its overrides completed, see `completed`."""
    overrides = [text for text in arguments if "=" in text and not text.startswith(("-", "hydra."))]
    done = dict(zip(overrides, completed(config_name, overrides), strict=True))
    return [done.get(text, text) for text in arguments]


@rank_zero_only
def _write_versions(folder: Path) -> None:
    write_versions(folder)


def _compose_once(config_name: str, overrides: list[str]) -> None:
    """Composes before Hydra does, so that an unknown knob is answered with the nearest ones."""
    try:
        own = [text for text in first_of_sweeps(overrides) if not text.lstrip("+~").startswith("hydra")]
        cfg = compose(config_name, own)
        missing = [str(name) for name in cfg if OmegaConf.is_missing(cfg, name)]
        if missing:
            hint = "experiment=quickstart" if config_name == "train" else f"{missing[0]}=..."
            raise UserError(f"{', '.join(missing)}: not given; give {hint}")
    except UserError as error:
        _exit_if_users(error)


def _exit_if_users(error: BaseException) -> None:
    """Ends the process with the message where the error, or one that caused it, is the user's to mend."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError | MisconfigurationException | OmegaConfBaseException):
            sys.stderr.write(f"error: {str(cause).strip()}\n")
            raise SystemExit(1) from None
        cause = cause.__cause__ or cause.__context__


def _quiet() -> None:
    """Leaves out the libraries' notices that say nothing to the user of a command."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for text in (
        ".*does not have many workers.*",
        ".*treespec.*is deprecated.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*Found .* module.* in eval mode.*",
        ".*smaller than the logging interval.*",
        ".*Trying to infer the `batch_size`.*",
    ):
        warnings.filterwarnings("ignore", text)
