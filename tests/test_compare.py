"""A comparison goes red when, and only when, its claim is not true; the message says why."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import compare, exercise, measure
from helpers.events import emit

N = 12
PATHS = [f"train/n01/{i:02}.JPEG" for i in range(N)]
IMAGES = SimpleNamespace(
    paths=PATHS, to_dict=lambda: {"kind": "test", "description": "12 test images"}
)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch, ray_session):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path))
    monkeypatch.setattr(
        compare,
        "provenance",
        lambda images: {
            "device": {"summary": "test device"},
            "versions": {"ray": "2", "torch": "2"},
            "images": images.to_dict(),
            "weights": {"summary": "test weights"},
            "date": "2026-01-01T00:00",
            "commit": None,
        },
    )
    return tmp_path


def table(shift: float = 0.0, paths=PATHS, builds: int = 1, seen: int = N):
    """A pipeline that answers at once: logits, model constructions and images through the model."""

    def pipeline():
        emit("model_constructions", builds)
        emit("images_through_model", seen)
        logits = [np.array([i + shift, 0.5]) for i in range(len(paths))]
        return {"path": list(paths), "logits": logits}

    return pipeline


EVIDENCE = {"model_constructions": ("== 4", "== 1")}


def both(naive, fixed, **options):
    return compare.compare("T2", naive, fixed, IMAGES, EVIDENCE, repeats=2, **options)


def test_a_true_claim_is_recorded(results):
    found = both(table(builds=4), table())
    record = json.loads((results / "T2.json").read_text())
    assert record["evidence"][0]["naive"] == [4, 4]
    assert record["evidence"][0]["fixed"] == [1, 1]
    assert record["answers"]["same"] == N
    assert len(record["naive"]) == len(record["fixed"]) == 2
    assert "4 before, 1 after" in found.finding()
    assert "model constructions" in found._repr_html_()
    for text in ("test device", found.plot().finding):
        assert text in found.plot()._repr_html_()


def test_a_wrong_answer_names_the_images():
    with pytest.raises(
        compare.ComparisonError, match=r"12 of 12 images.*\n  n01/00.JPEG: 0 against 1"
    ):
        both(table(builds=4), table(shift=1.0))


def test_a_counter_that_is_not_improved_is_named():
    with pytest.raises(
        compare.ComparisonError, match="'model_constructions' of the fixed pipeline is 4.*== 1"
    ):
        both(table(builds=4), table(builds=4))


def test_a_naive_side_without_its_mistake_is_named():
    with pytest.raises(compare.ComparisonError, match="naive pipeline is 1; it should be == 4"):
        both(table(builds=1), table())


def test_lost_and_repeated_rows_are_named():
    with pytest.raises(compare.ComparisonError, match="1 images lost.*n01/11.JPEG"):
        both(table(builds=4), table(paths=PATHS[:-1]))
    with pytest.raises(compare.ComparisonError, match="1 rows repeated"):
        both(table(builds=4), table(paths=[*PATHS, PATHS[0]]))


def test_not_a_number_is_never_the_same_answer():
    a, b = {"x": np.array([np.nan])}, {"x": np.array([np.nan])}
    assert not compare.agree(a, b, 1.0).all_same


def test_a_wrong_answer_can_be_the_mistake():
    both(table(shift=1.0, builds=4), table(), answers="different")
    with pytest.raises(compare.ComparisonError, match="should give wrong answers"):
        both(table(builds=4), table(), answers="different")


@pytest.mark.parametrize("text", ["4", "== ", "about 4", "=> 4", "== four"])
def test_a_condition_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="a condition looks like"):
        compare.Condition(text)


GOALS = {"model_constructions": "== 1"}


@pytest.fixture
def start():
    return measure.run(table(builds=4))


def test_exercise_done(start):
    result = exercise.check(table(), start, GOALS, required=True)
    assert result.passed and "4 at the start, 1 now" in repr(result)


def test_exercise_says_what_is_left(start):
    result = exercise.check(table(builds=3), start, GOALS)
    assert result.status == "not fixed yet"
    assert "model constructions is 3; the goal is == 1" in repr(result)


def test_exercise_takes_counters_of_the_lesson(start):
    start.extra["requests"] = 9
    goals = {"requests": "<= 4"}
    many = exercise.check(table(), start, goals, counters=lambda run: {"requests": 9})
    few = exercise.check(table(), start, goals, counters=lambda run: {"requests": 2})
    assert (many.status, few.status) == ("not fixed yet", "done")


def test_exercise_names_the_rows_of_a_wrong_answer(start):
    result = exercise.check(table(shift=2.0), start, GOALS)
    assert result.status == "wrong answer"
    assert "n01/00.JPEG: expected 0 but got 2" in repr(result)
    assert exercise.check(table(paths=PATHS[:3]), start, GOALS).status == "wrong answer"


def test_exercise_notices_answers_without_work(start):
    result = exercise.check(table(seen=0), start, GOALS)
    assert result.status == "too good to be true"


def stub(): ...


def broken():
    raise ValueError("no such layer")


@pytest.mark.parametrize(
    ("pipeline", "status", "text"),
    [
        (stub, "empty", "returns nothing yet"),
        (broken, "error", "ValueError: no such layer"),
        (lambda: 3, "error", "returned int"),
        (lambda: [{"path": "a"}], "error", "no column 'logits'"),
    ],
)
def test_exercise_never_shows_a_traceback(start, pipeline, status, text):
    result = exercise.check(pipeline, start, GOALS)
    assert result.status == status
    assert text in repr(result)
    assert "Traceback" not in result._repr_html_()


def test_a_solution_that_fails_its_check_is_an_error(start):
    with pytest.raises(AssertionError, match="(?i)not fixed yet"):
        exercise.check(table(builds=3), start, GOALS, required=True)
