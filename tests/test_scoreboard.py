"""The mistake index and the scoreboard say what the catalog and the records hold, and no more."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from bs4 import BeautifulSoup

from helpers import catalog, scoreboard
from helpers.compare import Agreement, Comparison, Condition, Evidence
from helpers.measure import Operator, Run, Sample

PROVENANCE = {
    "device": {"summary": "2 CPU cores, no GPU"},
    "system": "Linux x86_64",
    "python": "3.11.7",
    "versions": {"ray": "2.60.0", "torch": "2.14.1+cpu"},
    "images": {"kind": "folder", "description": "64 images, folder IMAGENETTE_DIR"},
    "weights": {"summary": "stand-in weights", "meaningful": False},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
}


def a_run(side: str, seconds: float, models: int) -> Run:
    return Run(
        name=side,
        seconds=seconds,
        first_batch_s=seconds / 2,
        first_batch_rows=8,
        answers={f"n01440764/{i}.JPEG": np.zeros(10) for i in range(64)},
        rows=64,
        executions=[[Operator("MapBatches(Model)", 8, 8, 64, 2_000_000, True, seconds)]],
        events=Counter(model_constructions=models, images_through_model=64),
        samples=[Sample(0.25, 90.0, 2_000_000_000, 1_000_000_000, 30_000_000, 32)],
        sampling_cost=0.004,
        spilled_bytes=0,
        bytes_read=7_000_000,
        bytes_written=0,
    )


def a_record(id: str, naive: list[float], fixed: list[float], answers="same", **provenance) -> dict:
    """A record as the lessons write it, through the same class."""
    claim = Evidence("model_constructions", Condition("== 8"), Condition("== 1"))
    same = 64 if answers == "same" else 27
    comparison = Comparison(
        id,
        [a_run("naive", seconds, 8) for seconds in naive],
        [a_run("fixed", seconds, 1) for seconds in fixed],
        [claim],
        Agreement(64, same, 0.0, 1e-3, same, []),
        answers,
        PROVENANCE | provenance,
    )
    return json.loads(json.dumps(comparison.to_dict()))


RECORDS = {
    "T1": a_record("T1", [5.0, 4.0, 4.2], [5.1, 4.1, 4.0]),
    "T2": a_record("T2", [20.0, 16.0, 17.0], [5.0, 4.0, 4.1]),
    "T10": a_record("T10", [9.0, 8.0, 8.1], [5.0, 4.0, 4.1]),
    "T11": a_record("T11", [4.0, 3.0, 3.1], [7.0, 6.0, 6.2]),
    "T12": a_record("T12", [3.0, 3.0, 3.0], [9.0, 9.0, 9.0], answers="different"),
    "ceiling": {"decode": [100.0], "model": [20.0]},  # a record of another kind
}


@pytest.fixture
def here() -> scoreboard.Machine:
    return scoreboard.machine(scoreboard.LIVE, RECORDS)


def write(folder, records: dict) -> None:
    folder.mkdir(parents=True)
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def everything(machines: list[scoreboard.Machine]) -> list:
    first = machines[0]
    return [
        scoreboard.counters_table(first),
        scoreboard.times_table(first),
        scoreboard.memory_table(first),
        scoreboard.times_figure(first),
        scoreboard.across_machines(machines),
        scoreboard.provenance_table(machines),
        scoreboard.measured_on(first),
        scoreboard.show(scoreboard.summary(first)),
        scoreboard.show(scoreboard.sampling_cost(first)),
    ]


# --- results -----------------------------------------------------------------------------------


def test_costliest_mistake_comes_first_and_wrong_answers_last(here):
    assert [result.id for result in here.results] == ["T2", "T10", "T1", "T11", "T12"]
    assert "T12" not in [result.id for result in here.timed]


def test_effects_are_named_honestly(here):
    text = scoreboard.summary(here)
    assert "saves time for T2 4.0x and T10 2.0x" in text
    assert "no clear difference in time for T1" in text
    assert "costs time here for T11 (2.0x slower)" in text
    assert "T12 is not ranked by time" in text and "37 of 64 answers are wrong" in text


def test_overlapping_runs_are_no_difference_whatever_their_minimum():
    noisy = scoreboard.Result(a_record("T1", [9.0, 6.0, 4.0], [9.0, 5.0, 2.0]))
    assert noisy.speedup == 2.0
    assert noisy.effect == "unclear"
    cold = scoreboard.Result(a_record("T1", [30.0, 6.0, 6.1], [20.0, 2.0, 2.1]))
    assert cold.effect == "saves", "a cold first run is no overlap"


def test_one_run_per_side_is_called_what_it_is():
    machine = scoreboard.machine(scoreboard.LIVE, {"T2": a_record("T2", [8.0], [2.0])})
    assert "no spread" in scoreboard.summary(machine)
    assert "8.0 (" not in repr(scoreboard.times_table(machine))


def test_without_results_every_part_says_so_plainly(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        empty = scoreboard.live(folder)
        assert empty.results == ()
        for part in everything([empty]):
            assert "No results yet" in part._repr_html_()
    assert scoreboard.recorded(tmp_path) == []
    assert scoreboard.recorded(tmp_path / "missing") == []


def test_live_results_are_those_of_this_build(tmp_path, monkeypatch):
    write(tmp_path / "results", RECORDS)
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    assert len(scoreboard.live().results) == 5


def test_recorded_machines_stand_beside_the_live_one(tmp_path, here):
    write(tmp_path / "one-gpu", {"T2": a_record("T2", [8.0, 8.1], [2.0, 2.1])})
    write(tmp_path / "no-comparisons", {"ceiling": {}})
    (tmp_path / "README.md").write_text("not a machine")
    machines = [here, *scoreboard.recorded(tmp_path)]
    assert [m.name for m in machines] == ["this build", "one-gpu"]
    table = scoreboard.across_machines(machines)
    assert [row[0].split()[0] for row in table.rows] == ["T1", "T2", "T10", "T11"]
    assert table.rows[1][1:] == ["4.0x faster", "4.0x faster"]
    assert table.rows[0][2] == "not measured"


def test_a_broken_record_is_named(tmp_path):
    write(tmp_path / "broken" / "half", {})
    (tmp_path / "broken" / "half" / "T2.json").write_text('{"id": "T2", "naive"')
    with pytest.raises(ValueError, match="half is not JSON"):
        scoreboard.recorded(tmp_path / "broken")
    with pytest.raises(ValueError, match="T2.json of half lacks answers, provenance"):
        lacking = {k: v for k, v in RECORDS["T2"].items() if k not in ("answers", "provenance")}
        scoreboard.machine("half", {"T2": lacking})


def test_differing_provenance_is_not_hidden():
    other = a_record("T3", [4.0], [2.0], commit="def5678")
    machine = scoreboard.machine("mixed", {"T2": RECORDS["T2"], "T3": other})
    facts = {row[0]: row[1] for row in scoreboard.provenance_table([machine]).rows}
    assert set(facts["commit"].split("; ")) == {"abc1234", "def5678"}
    assert facts["runs per side"] == "1–3"
    assert facts["torch"] == "2.14.1"


def test_generated_images_and_stand_in_weights_are_said():
    images = {"kind": "generated", "description": "64 images, generated sample"}
    machine = scoreboard.machine("x", {"T2": a_record("T2", [4.0], [2.0], images=images)})
    text = scoreboard.measured_on(machine)._repr_html_()
    assert "not photographs" in text and "labels mean nothing" in text


def test_figure_states_its_finding_and_what_it_was_measured_on(here):
    figure = scoreboard.times_figure(here)
    image = BeautifulSoup(figure._repr_html_(), "html.parser").find("img")
    assert image["alt"] == scoreboard.summary(here)
    assert "2 CPU cores" in figure.provenance and "abc1234" in figure.provenance


def test_counters_are_shown_with_the_answers(here):
    table = scoreboard.counters_table(here)
    t2 = next(row for row in table.rows if row[0] == "T2")
    assert t2[1:] == ["model constructions", "8", "1", "64 of 64"]
    assert [row[0] for row in table.rows] == ["T1", "T2", "T10", "T11", "T12"]


@pytest.mark.parametrize(
    ("expected", "shown"),
    [("== 4", ""), (">= 1_000_000", " (at least 1.0 MB)"), ("< 500", " (under 0.5 kB)")],
)
def test_conditions_in_words(expected, shown):
    assert scoreboard._bound("bytes_out:Model", expected) == shown


def test_memory_is_in_megabytes(here):
    table = scoreboard.memory_table(here)
    assert table.rows[1] == ["T2", "30.0", "30.0", "2,000", "2,000"]


def test_sampling_cost_is_reported(here):
    text = scoreboard.sampling_cost(here)
    assert "30 runs" in text and "0.40%" in text


def test_older_records_need_no_entry_in_the_catalog():
    old = a_record("T2", [4.0], [2.0]) | {"id": "Z9", "title": "A mistake of an older edition"}
    machine = scoreboard.machine("old", {"Z9": old})
    assert "older edition" in repr(scoreboard.times_table(machine))
    assert "Z9" in repr(scoreboard.across_machines([machine]))


# --- the lessons -------------------------------------------------------------------------------


def write_lesson(folder, name: str, text: str) -> None:
    cell = {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}
    (folder / name).write_text(json.dumps({"cells": [cell]}))


def test_lessons_state_their_own_minutes(tmp_path):
    write_lesson(
        tmp_path, "03_b.ipynb", "# Second: one\n\n**Minutes**: read 50 · run 10 · exercise 20."
    )
    write_lesson(tmp_path, "00_a.ipynb", "# First\n\nMinutes: read 15, run 5, exercise 10\n")
    rows = BeautifulSoup(scoreboard.lessons(tmp_path)._repr_html_(), "html.parser").select("tr")
    texts = [[cell.get_text() for cell in row.select("td")] for row in rows[1:]]
    assert texts[0] == ["00 · First", "15", "5", "10", "30"]
    assert texts[1] == ["03 · Second: one", "50", "10", "20", "80"]
    assert texts[2][1:] == ["65", "15", "30", "110"]
    assert rows[2].find("a")["href"] == "../lessons/03_b.html"


def test_a_lesson_without_minutes_is_named(tmp_path):
    write_lesson(tmp_path, "04_c.ipynb", "# Third")
    with pytest.raises(ValueError, match="04_c.ipynb"):
        scoreboard.lessons(tmp_path)


# --- the index of mistakes ---------------------------------------------------------------------


@pytest.fixture
def index() -> BeautifulSoup:
    return BeautifulSoup(scoreboard.mistake_index()._repr_html_(), "html.parser")


def test_every_mistake_is_in_the_index_with_a_link_to_where_it_is_measured(index):
    rows = index.select("tbody tr")
    assert len(rows) == len(catalog.MISTAKES)
    for row, mistake in zip(rows, catalog.MISTAKES.values(), strict=True):
        link = row.find("a")["href"]
        assert link == f"../lessons/{mistake.lesson}.html#{mistake.id.lower()}"
        text = row.get_text()
        parts = (mistake.symptom, mistake.cause, mistake.evidence, mistake.knob, mistake.no_help)
        for part in parts:
            assert part.replace("`", "") in text


def test_index_is_whole_without_scripts_and_asks_nobody(index):
    assert index.select_one(".mistakes-filter").has_attr("hidden"), "a box that does nothing"
    assert not index.select("tbody tr[hidden]")
    assert "//" not in index.find("script").string
    assert not index.find("script").has_attr("src")


def test_index_is_usable_by_keyboard_and_screen_reader(index):
    box = index.find("input")
    assert index.find("label")["for"] == box["id"]
    assert index.select_one("[role=status]")
    assert all(cell["data-label"] for cell in index.select("tbody td"))
