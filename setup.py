"""The packages of the wheel: `ldm`, and the configurations in configs/ as `ldm/configs`. All else: pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = Path(__file__).parent / "configs"


def require_configs() -> None:
    """Ends the build with one line where a command's configuration, or a group that it chooses from, is missing."""
    missing, groups = [], {"metric"}
    for path in (CONFIGS / f"{name}.yaml" for name in ("train", "sample", "evaluate")):
        if path.is_file():
            groups |= set(re.findall(r"^  - ([a-z_]+): ", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        else:
            missing.append(path.name)
    missing += sorted(f"{group}/" for group in groups if not list((CONFIGS / group).glob("*.yaml")))
    if missing:
        raise SystemExit(f"error: {CONFIGS} has no {', '.join(missing)}, which the package needs")


require_configs()
setup(
    packages=[*find_packages(include=["ldm", "ldm.*"]), "ldm.configs"],
    package_dir={"ldm.configs": "configs"},
    package_data={"ldm.configs": ["**/*.yaml"]},
)
