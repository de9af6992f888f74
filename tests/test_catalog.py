"""Every mistake stands in exactly one lesson, is checked there, and is told in full."""

import ast
import json
import re
from pathlib import Path

import pytest

from helpers import catalog

LESSONS = Path(__file__).resolve().parent.parent / "lessons"
COUNTS = {"I": 11, "T": 12, "R": 12, "O": 8}


def code_of(lesson: Path) -> str:
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def prose_of(lesson: Path) -> str:
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def comparisons(lesson: Path) -> list[tuple[str, bool]]:
    """The id of each comparison in a lesson, and whether it states its evidence."""
    found = []
    for node in ast.walk(ast.parse(code_of(lesson))):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if node.args[0].value in catalog.MISTAKES and name in ("measure_both", "compare"):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                evidence = keywords.get("evidence", node.args[4] if len(node.args) > 4 else None)
                empty = evidence is None or (isinstance(evidence, ast.Dict) and not evidence.keys)
                found.append((node.args[0].value, not empty))
    return found


EXECUTED = {path.stem: comparisons(path) for path in sorted(LESSONS.glob("[0-9]*.ipynb"))}


def test_the_catalog_is_complete():
    expected = {f"{family}{n}" for family, count in COUNTS.items() for n in range(1, count + 1)}
    assert set(catalog.MISTAKES) == expected


@pytest.mark.parametrize("id", catalog.MISTAKES)
def test_each_mistake_is_executed_in_its_lesson_only_with_its_counter_checked(id):
    lessons = [lesson for lesson, found in EXECUTED.items() if id in dict(found)]
    assert lessons == [catalog.MISTAKES[id].lesson]
    assert all(states for other, states in EXECUTED[lessons[0]] if other == id)


@pytest.mark.parametrize("id", catalog.MISTAKES)
def test_each_mistake_has_a_heading_that_can_be_linked_to(id):
    prose = prose_of(LESSONS / f"{catalog.MISTAKES[id].lesson}.ipynb")
    assert re.search(rf"^\({id.lower()}\)=\n## {id} · \S", prose, re.MULTILINE)


@pytest.mark.parametrize("mistake", catalog.MISTAKES.values(), ids=lambda m: m.id)
def test_each_mistake_is_told_in_full(mistake):
    for part in ("title", "symptom", "cause", "evidence", "knob", "no_help"):
        assert getattr(mistake, part).strip(), part
    assert mistake.family in catalog.FAMILIES


def test_each_label_of_the_original_template_went_somewhere():
    assert len(catalog.ORIGINAL_LABELS) == 29
    for label in catalog.ORIGINAL_LABELS:
        assert label.ids or label.reason, label.name
        assert set(label.ids) <= set(catalog.MISTAKES), label.name
