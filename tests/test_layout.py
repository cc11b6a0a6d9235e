"""The packaging: folders at the top level, installed under llmx, in step with their links."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_mapped_to_the_folder_that_holds_it() -> None:
    folders = {path.parent for path in ROOT.glob("*/**/__init__.py") if ".venv" not in path.parts}
    real = {
        path.relative_to(ROOT).as_posix() for path in folders if not any(p.is_symlink() for p in (path, *path.parents))
    }
    assert set(SETTINGS["package-dir"].values()) == real
    assert set(SETTINGS["package-dir"]) == set(SETTINGS["packages"])


def test_every_top_level_folder_has_its_link_inside_llmx() -> None:
    for package, folder in SETTINGS["package-dir"].items():
        if package.count(".") == 1:
            link = ROOT / "llmx" / folder
            assert link.is_symlink()
            assert link.resolve() == ROOT / folder


def test_the_demo_checkpoint_is_embedded_and_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "examples").rglob("*") if path.is_file())
    assert size < 8e6


def test_every_file_that_is_no_module_is_packaged_with_its_folder() -> None:
    packages = {folder: package for package, folder in SETTINGS["package-dir"].items() if package.count(".") == 1}
    for folder, package in packages.items():
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        patterns = SETTINGS["package-data"].get(package, [])
        assert files == {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}, folder
