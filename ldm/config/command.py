"""Commands: a main function behind Hydra's command line, and one clear line where it cannot go on."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.compose import CONFIGS
from ldm.config.help import help_text
from ldm.config.overrides import with_texts
from ldm.config.processes import job_processes
from ldm.config.run_folder import register_resolvers
from ldm.errors import Interrupted, UserError


@dataclass(frozen=True)
class Invocation:
    """What a command was called with: its overrides, and the folder that its files go to."""

    overrides: list[str]
    folder: Path


Main = Callable[[DictConfig, Invocation], float | None]
DEBUG = "HYDRA_FULL_ERROR"


def command(config_name: str, texts: Sequence[str] = ()) -> Callable[[Main], Callable[[], None]]:
    """Makes `main(cfg, invocation)` a command line of overrides.

    A user's error ends it with its message and exit status 1, HYDRA_FULL_ERROR=1 shows the traceback. The values of
    the knobs `texts` are taken literally, outside of a sweep. The current folder is on the import path, for the
    user's own classes.
    """

    debug = os.environ.get(DEBUG) == "1"

    def decorate(main: Main) -> Callable[[], None]:
        def job(cfg: DictConfig) -> float | None:
            config = HydraConfig.get()
            try:
                missing = [str(name) for name in cfg if OmegaConf.is_missing(cfg, name)]
                if missing:
                    raise UserError(_not_given(config_name, missing))
                with job_processes():
                    return main(cfg, Invocation(list(config.overrides.task), Path(config.runtime.output_dir)))
            except Exception as error:
                _exit_if_user_error(error, debug)
                raise

        def run() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                sys.stdout.write(help_text(config_name, sys.argv[1:]))
                return
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            register_resolvers()
            lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
            lightning.addFilter(lambda record: not str(record.msg).startswith(NOTICES))
            for text in WARNINGS:
                warnings.filterwarnings("ignore", text)
            if not {"-m", "--multirun"} & set(sys.argv):
                sys.argv[1:] = with_texts(sys.argv[1:], texts)
            os.environ[DEBUG] = "1"  # Hydra then hands errors on, instead of printing them in its own way
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
            except Exception as error:
                _exit_if_user_error(error, debug)
                raise

        return run

    return decorate


def _not_given(config_name: str, names: Sequence[str]) -> str:
    hint = "experiment=quickstart" if config_name == "train" else f"{names[0]}=..."
    return f"{', '.join(names)}: not given; give {hint}"


def _exit_if_user_error(error: BaseException, debug: bool) -> None:
    """Ends the process with the message where the error, or one that caused it, is for the user to fix."""
    if debug and not isinstance(error, Interrupted):
        return
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Interrupted):
            sys.stderr.write(f"{cause}\n")
            raise SystemExit(cause.exit_status) from None
        name = type(cause).__name__
        if isinstance(cause, UserError | OmegaConfBaseException) or name == "MisconfigurationException":
            message = str(cause).strip()
            if "Missing mandatory value" in message or "MissingMandatory" in name:
                message = f"{message.splitlines()[0]}; give it on the command line"
            sys.stderr.write(f"error: {message}\n")
            raise SystemExit(1) from None
        cause = cause.__cause__ or cause.__context__


# Notices of libraries that say nothing to the user of a command
WARNINGS = (
    ".*does not have many workers.*",
    ".*treespec.*is deprecated.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*Found .* module.* in eval mode.*",
    ".*smaller than the logging interval.*",
    ".*Trying to infer the `batch_size`.*",
    ".*Checkpoint directory .* exists.*",
)
NOTICES = (
    "💡 Tip:", "GPU available:", "TPU available:", "HPU available:", "Using default", "`Trainer.fit` stopped",
    "Restoring states from", "Restored all states", "Seed set to", "Trainer already configured",
)  # fmt: skip
