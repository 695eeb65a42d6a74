"""`--help` of a command: what it does, examples, and the groups with their options, on one screen."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from ldm.config.compose import CONFIGS

WIDTH = 100
COMMANDS = {
    "train": (
        "Train the stages of an experiment: first stage, base, fine-tune. One launch is one folder.",
        (
            "python train.py experiment=quickstart",
            "python train.py experiment=sd1 data.train.shards='data/{00000..00127}.tar' trainer.devices=8",
            "python train.py experiment=NAME resume=auto                  # continue the newest run",
            "python train.py experiment=NAME -m optimizer.lr=1e-4,2e-4    # a sweep",
            "python train.py --config-dir mine/configs experiment=mine --cfg job    # show it, run nothing",
        ),
        ("experiment", "variant", "task", "first_stage", "first_stage_loss", "network", "conditioner", "schedule",
         "prediction", "weighting", "time_density", "criterion", "loss", "optimizer", "lr_schedule", "data", "trainer",
         "sampler", "grid", "guidance", "callbacks", "logger"),
        "configs/train.yaml lists the other knobs; docs/train.md explains them.",
    ),
    "sample": (
        "Make pictures with a trained model: a run's folder, a stage's, or a model folder.",
        (
            'python sample.py checkpoint=outputs/NAME/TIME prompt="a red circle" out=pictures',
            "python sample.py checkpoint=... prompts=FILE out=DIR n=4 seed=0 steps=50 guidance_scale=7.5",
            'python sample.py checkpoint=... prompt="..." init_image=FILE strength=0.8 mask=FILE out=DIR',
            'python sample.py checkpoint=... prompt="..." out=DIR sheet.x="steps=10,20,50" sheet.y="seed=0,1"',
            "python sample.py from=pictures/00000_seed0.png out=again     # from its metadata",
        ),
        ("sampler", "grid", "guidance"),
        "configs/sample.yaml lists the other knobs; what is not given is the model's own. docs/sample.md.",
    ),
    "evaluate": (
        "Measure a trained model: FID, CLIP score and others, each with its provenance and interval.",
        (
            "python evaluate.py checkpoint=outputs/NAME/TIME out=scores",
            "python evaluate.py checkpoint=... out=scores n=10000 guidance_scale=[1.5,3,5,7.5]",
            "python evaluate.py checkpoint=... out=scores metrics=[fid,clip_score] data=data/coco",
            "python evaluate.py checkpoint=... out=scores sampler=ddim steps=50 size=[512,512]",
            "python evaluate.py checkpoint=... out=scores metrics=[fid] metric_options.fid.features.path=FILE",
        ),
        ("metric", "sampler", "grid", "guidance"),
        "configs/evaluate.yaml lists the other knobs; what is not given is the model's own. docs/evaluate.md.",
    ),
}  # fmt: skip


def help_text(config_name: str, arguments: Sequence[str]) -> str:
    """The help of a command, with the options of a `--config-dir` among `arguments`."""
    purpose, examples, groups, more = COMMANDS[config_name]
    lines = [purpose, "", *(f"  {example}" for example in examples), "", "Groups (GROUP=OPTION):"]
    folders = [CONFIGS, *_config_dirs(arguments)]
    for group in groups:
        found = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        head = f"  {group:<17}"
        lines += wrap(", ".join(found), WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    lines += [
        "",
        *wrap(f"Every knob: KNOB=VALUE, e.g. optimizer.lr=1e-4. {more}", WIDTH),
        "Hydra's own options: --hydra-help. Tracebacks: HYDRA_FULL_ERROR=1.",
    ]
    return "\n".join(lines) + "\n"


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    found = []
    for i, text in enumerate(arguments):
        if text in ("--config-dir", "-cd") and i + 1 < len(arguments):
            found.append(Path(arguments[i + 1]))
        elif text.startswith("--config-dir="):
            found.append(Path(text.partition("=")[2]))
    return found
