"""A slider picks a measured point and says what was measured there, without computing anything."""

import pytest

from helpers.explore import explorer

ONE = {"axes": {"batch size": [1, 8, 32]}, "runs": {(1,): [10.0, 9.0], (8,): [20.0], (32,): [5.0]}}
TWO = {
    "axes": {"threads": [1, 2], "actors": [1, 2]},
    "runs": {(1, 1): [4.0], (1, 2): [8.0], (2, 1): [6.0]},
}
WORDS = {"value": "images/s", "title": "Batch size", "finding": "8 is fastest."}


def test_a_point_is_described_with_its_spread_and_its_distance_from_the_best():
    found = explorer(**ONE, **WORDS)
    assert found.best == (8,)
    assert found.describe((1,)) == (
        "batch size 1: 10 images/s (best of 2 runs, 9 to 10), 50 % of the best (20)"
    )
    assert found.describe((8,)).endswith("the best of this grid")


def test_what_was_not_measured_is_said_to_be_so():
    found = explorer(**TWO, **WORDS)
    assert found.describe((2, 2)) == "threads 2, actors 2: not measured"
    assert "–" in found._repr_mimebundle_()["text/html"]


def test_lower_can_be_better():
    assert explorer(**ONE, **WORDS, lower_is_better=True).best == (32,)


def test_every_point_stands_in_the_page_without_any_script():
    page = explorer(**TWO, **WORDS)._repr_mimebundle_()["text/html"]
    assert page.count("data-at=") == 4 and "8 is fastest." in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("axes", "runs", "text"),
    [
        ({"a": [1]}, {}, "nothing was measured"),
        ({"a": [1]}, {(2,): [1.0]}, "not on the grid"),
        ({"a": [1], "b": [1]}, {(1,): [1.0]}, "not on the grid"),
        ({"a": [1], "b": [1], "c": [1]}, {(1, 1, 1): [1.0]}, "one or two axes"),
    ],
)
def test_a_grid_that_cannot_be_shown_is_refused(axes, runs, text):
    with pytest.raises(ValueError, match=text):
        explorer(axes, runs, **WORDS)
