"""The repository keeps its own rules: clean notebooks, a complete book, a lock that fits."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import notebooks
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
BUILT = {".venv", "_build", ".stage", ".git", ".ipynb_checkpoints", "__pycache__"}
LESSONS = sorted((ROOT / "lessons").glob("*.ipynb"))
BOOK_PAGES = sorted((ROOT / "book").glob("*.md"))
LONGEST_CELL = 25  # lines
LARGEST_FILE = 1_500_000  # bytes

lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def own_files() -> list[Path]:
    """The files that belong to the repository: git's list, or all that is not built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not BUILT & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def cells(path: Path, kind: str) -> list[str]:
    """Sources of the notebook's cells of one kind, "code" or "markdown"."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


# --- notebooks -----------------------------------------------------------------------------------


@lesson
def test_lesson_has_no_outputs(path):
    found = notebooks.strip(json.loads(path.read_text(encoding="utf-8")))
    assert not found, f"python tests/notebooks.py --strip lessons/{path.name}"


@lesson
def test_lesson_cells_are_short(path):
    long = [cell for cell in cells(path, "code") if cell.count("\n") >= LONGEST_CELL]
    assert not long, f"{len(long)} code cells are longer than {LONGEST_CELL} lines"


@lesson
def test_lesson_cells_have_unique_ids(path):
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert len(ids) == len(set(ids))


@lesson
def test_lesson_follows_the_skeleton(path):
    prose = cells(path, "markdown")
    assert prose[0].startswith("# "), "the first cell is the title"
    titles = re.findall(r"^# .+$", "\n".join(prose), flags=re.MULTILINE)
    assert len(titles) == 1, titles
    text = "\n".join(prose).lower()
    for part in ("minutes", "exercise", "recap", "further reading", "instructor notes"):
        assert part in text, f"the lesson has no '{part}'"


def test_strip_removes_what_a_run_left_and_nothing_else():
    clean = {
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": "# Title"},
            {
                "cell_type": "code",
                "metadata": {"tags": ["hide-input"]},
                "source": "1 + 1",
                "outputs": [],
                "execution_count": None,
            },
        ],
        "metadata": {
            "kernelspec": dict(notebooks.KERNEL),
            "language_info": {"name": "python"},
            "execution": {"timeout": 60},
        },
    }
    dirty = json.loads(json.dumps(clean))
    dirty["cells"][1] |= {"outputs": [{"output_type": "stream"}], "execution_count": 3}
    dirty["cells"][1]["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01"}
    dirty["metadata"] |= {"widgets": {}, "language_info": {"name": "python", "version": "3.12.1"}}
    assert notebooks.strip(json.loads(json.dumps(clean))) == []
    assert len(notebooks.strip(dirty)) == 5
    assert dirty == clean


# --- the book ------------------------------------------------------------------------------------


def toc_entries() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *chapters]


def test_every_page_is_in_the_table_of_contents():
    pages = {p.relative_to(ROOT).with_suffix("").as_posix() for p in LESSONS + BOOK_PAGES}
    assert sorted(toc_entries()) == sorted(pages)


def test_lessons_stand_in_order():
    listed = [entry for entry in toc_entries() if entry.startswith("lessons/")]
    assert listed == sorted(listed)


def test_pages_read_last_exist():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert set(config["sphinx"]["config"]["read_last"]) <= set(toc_entries())


def test_images_in_prose_have_alternative_text():
    prose = {page: page.read_text(encoding="utf-8") for page in BOOK_PAGES}
    prose |= {page: "\n".join(cells(page, "markdown")) for page in LESSONS}
    for page, text in prose.items():
        assert not re.findall(r"!\[\s*\]\(", text), f"{page.name}: image without alternative text"


# --- the files -----------------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:home/\w|root/|Users/\w|work/|tmp/\w)")
    allowed = {Path(__file__).resolve()}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in own_files()
        if path.resolve() not in allowed
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_large():
    large = [f"{p.relative_to(ROOT)}" for p in own_files() if p.stat().st_size > LARGEST_FILE]
    assert not large


# --- the lock ------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(path: Path) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pinned_versions() -> dict[str, list[Version]]:
    pins: dict[str, list[Version]] = {}
    for pin in requirements(ROOT / "constraints.txt"):
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        pins.setdefault(canonical(pin.name), []).append(Version(specifier.version))
    return pins


def test_lock_pins_every_requirement_within_its_bounds():
    pins = pinned_versions()
    for file in ("requirements.txt", "tests/requirements.txt"):
        for requirement in requirements(ROOT / file):
            versions = pins.get(canonical(requirement.name))
            assert versions, f"{requirement.name} is not in constraints.txt: make lock"
            assert all(requirement.specifier.contains(v) for v in versions), requirement


def test_lock_names_no_host():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and "@" not in text and "--" not in text


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_lock_pins_each_package_once_on_every_platform(python, system):
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": {"linux": "x86_64", "darwin": "arm64"}[system],
        "os_name": "posix",
    }
    names = [
        canonical(pin.name)
        for pin in requirements(ROOT / "constraints.txt")
        if pin.marker is None or pin.marker.evaluate(environment)
    ]
    assert len(names) == len(set(names))
    for needed in requirements(ROOT / "requirements.txt"):
        assert canonical(needed.name) in names
