"""mkdocs hooks: pages from outside docs/ (README, CONTRIBUTING, benchmarks), API pages, and links among them all."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # in the repository -> on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    **{f"benchmarks/results/{path.name}": f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")},
}
ROOMS = {  # the pages of the API reference and their modules or packages
    "diffusion": ["diffusion"],
    "sampling": ["sampling"],
    "networks": ["networks"],
    "first_stage": ["first_stage"],
    "conditioning": ["conditioning"],
    "models": ["latent_diffusion", "generation", "checkpoint", "randomness", "errors", "versions"],
    "data": ["data.shards", "data.order", "data.loading"],
    "training": ["training"],
    "evaluation": ["evaluation"],
    "interop": ["interop"],
    "config": ["config"],
    "commands": ["commands"],
}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not stand in docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for room, packages in ROOMS.items():
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room, packages)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between pages of the site."""
    here = next(
        (source for source, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    return LINK.sub(lambda match: f"{match[1]}{site_link(here, page.file.src_uri, match[2])}{match[3]}", markdown)


def site_link(here: str, page: str, link: str) -> str:
    """The link of the file `here`, which is `page` on the site, as a link of the page."""
    target = os.path.normpath(PurePosixPath(here).parent / link)
    place = PAGES.get(target, target.removeprefix("docs/"))
    return os.path.relpath(place, PurePosixPath(page).parent)


def api_page(title: str, packages: list[str]) -> str:
    """Every module of the packages, documented by mkdocstrings."""
    lines = [f"# {', '.join(f'ldm.{name}' for name in packages)}", ""]
    for name in packages:
        path = ROOT / "ldm" / name.replace(".", "/")
        modules = (
            sorted(file.stem for file in path.glob("*.py") if not file.stem.startswith("_")) if path.is_dir() else []
        )
        lines += [f"::: ldm.{name}.{module}\n" for module in modules] or [f"::: ldm.{name}\n"]
    return "\n".join(lines)
