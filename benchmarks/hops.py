"""How far it is from a command to its result: python -m benchmarks.hops [--checkpoint RUN] [--rounds 3].

For one command each of sample.py, train.py and evaluate.py, from process start to end: our modules imported; our
functions run (distinct code objects, without comprehensions, lambdas and class bodies) and the files that they are in;
Hydra compositions; the processor time before a checkpoint's weights are read, as a multiple of that of `import torch`
(the least of some interleaved rounds); and the heavy packages imported. Without --checkpoint it trains a model of
captioned shapes in miniature.

    python benchmarks/hops.py --trace FILE SCRIPT ARGUMENTS    one command; the functions are listed in FILE
"""

import argparse
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = str(ROOT / "ldm") + os.sep
HEAVY = (
    "pytorch_lightning", "wandb", "matplotlib", "webdataset", "torchmetrics", "pyarrow", "transformers", "scipy",
)  # fmt: skip
COMPOSITION = "ConfigLoaderImpl.load_configuration"
CO_OPTIMIZED = 1  # a function's flag; class bodies and modules have none
NAMELESS = ("<lambda>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
IMPORT_TORCH = "import time, torch; print(time.process_time())"
TINY = ("experiment=quickstart", "variant=tiny")


def trace(script: str, arguments: list[str]) -> dict[str, Any]:
    """Run a script in this process; its modules, functions by file, compositions, packages and exit status."""
    codes: set[CodeType] = set()
    compositions = 0

    def called(frame: FrameType, event: str, argument: object) -> None:
        nonlocal compositions
        if event == "call":
            code = frame.f_code
            codes.add(code)
            compositions += code.co_qualname == COMPOSITION

    sys.argv, status = [script, *arguments], 0
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    functions: dict[str, list[str]] = {}
    for code in codes:
        if code.co_filename.startswith(PACKAGE) and code.co_flags & CO_OPTIMIZED and code.co_name not in NAMELESS:
            functions.setdefault(code.co_filename.removeprefix(PACKAGE), []).append(code.co_qualname)
    return {
        "status": status,
        "modules": sorted(name for name in sys.modules if name.split(".")[0] == "ldm"),
        "functions": {file: sorted(names) for file, names in sorted(functions.items())},
        "compositions": compositions,
        "packages": [name for name in HEAVY if name in sys.modules],
    }


def time_to_weights(script: str, arguments: list[str]) -> None:
    """Run a script until it opens a file of weights, write the processor time so far (seconds), and end."""

    def opened(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and str(values[0]).endswith(".safetensors"):
            sys.stdout.write(f"{time.process_time()}\n")
            sys.stdout.flush()
            os._exit(0)

    sys.argv = [script, *arguments]
    sys.addaudithook(opened)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(*arguments: str) -> str:
    """The output of Python with these arguments, on one thread, from the checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def traced(script: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """`trace` in a process of its own."""
    path = folder / f"{Path(script).stem}.json"
    run("benchmarks/hops.py", "--trace", str(path), script, *arguments)
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def shards(folder: Path) -> list[str]:
    """Captioned shapes, drawn into the folder, as knobs of a command."""
    run("-m", "ldm.examples.shapes", str(folder), "--train", "64", "--val", "16", "--size", "32", "--per-shard", "32")
    return [
        f"data.train.shards={folder}/train",
        f"data.val.shards={folder}/val",
        f"evaluation.sets.validation={folder}/val",
        f"evaluation.sets.held_out={folder}/val",
    ]


def times_of_torch(script: str, arguments: list[str], rounds: int) -> float:
    """Processor time until weights are read, as a multiple of that of `import torch`; the least of both."""
    ours, torch = [], []
    for _ in range(rounds):
        torch.append(float(run("-c", IMPORT_TORCH)))
        ours.append(float(run("benchmarks/hops.py", "--time", script, *arguments).split()[-1]))
    return min(ours) / min(torch)


def measure(checkpoint: str | None, rounds: int, folder: Path) -> list[str]:
    """The lines of a Markdown table, a row for each command."""
    data = shards(folder / "shapes")
    if checkpoint is None:
        checkpoint = str(folder / "run")
        run("train.py", *TINY, *data, "stages=[first_stage,base]", f"hydra.run.dir={checkpoint}")
    sample = [f"checkpoint={checkpoint}", "prompt=a red circle", "n=1", f"out={folder}/out", "overwrite=true"]
    train = [*TINY, *data, "stages=[first_stage]", f"hydra.run.dir={folder}/one"]
    evaluate = [f"checkpoint={checkpoint}", f"data={folder}/shapes/val", "n=4", "steps=2", "metrics=[frechet]",
                f"out={folder}/scores"]  # fmt: skip
    lines = [
        "| command | modules | functions | files | compositions | times import torch | heavy packages |",
        "|---" * 7 + "|",
    ]
    for script, arguments in (("sample.py", sample), ("train.py", train), ("evaluate.py", evaluate)):
        facts = traced(script, arguments, folder)
        functions = sum(map(len, facts["functions"].values()))
        before = "" if script == "train.py" else f"{times_of_torch(script, arguments, rounds):.2f}"
        numbers = (len(facts["modules"]), functions, len(facts["functions"]), facts["compositions"], before)
        lines.append(f"| {script} | {' | '.join(map(str, numbers))} | {', '.join(facts['packages'])} |")
    return lines


def size() -> int:
    """Lines of the library without its examples."""
    files = [path for path in (ROOT / "ldm").rglob("*.py") if "examples" not in path.parts]
    return sum(path.read_bytes().count(b"\n") for path in files)


def main() -> None:
    """The table, on the standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a finished run; by default one is trained in miniature")
    parser.add_argument("--rounds", type=int, default=3, help="of the processor times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(options.checkpoint, options.rounds, Path(folder))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "hydra-core", "transformers"))
    facts = f"Python {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores; {time.strftime('%d %B %Y')}."
    sys.stdout.write("\n".join([facts, "", *lines, "", f"ldm/ without examples: {size():,} lines.", ""]))


if __name__ == "__main__":
    mode, *rest = sys.argv[1:] or [""]
    if mode == "--trace":
        result = trace(rest[1], rest[2:])
        Path(rest[0]).write_text(json.dumps(result, indent=1))
        sys.exit(result["status"])
    elif mode == "--time":
        time_to_weights(rest[0], rest[1:])
    else:
        main()
