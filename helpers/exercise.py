"""Check a learner's pipeline and say, kindly, what is left to do.

A check looks at three things, in this order: does each image have the right answer, is the counter
that was the mistake where it should be, and was the work really done?
"""

from collections.abc import Callable
from dataclasses import dataclass

from helpers import measure, plots
from helpers.compare import Condition, agree, counter_name, counter_value
from helpers.measure import Run


@dataclass
class Result:
    """The verdict. `status`: "done", "wrong answer", "not fixed yet", "too good to be true",
    "empty" or "error"."""

    status: str
    lines: list[str]
    run: Run | None = None

    _KINDS = {
        "done": "ok",
        "wrong answer": "wrong",
        "not fixed yet": "notfixed",
        "too good to be true": "suspicious",
        "empty": "note",
        "error": "wrong",
    }

    @property
    def passed(self) -> bool:
        return self.status == "done"

    def _repr_html_(self) -> str:
        return plots.panel(self._KINDS[self.status], self.status.capitalize(), self.lines)

    def __repr__(self) -> str:
        return f"{self.status.capitalize()}\n" + "\n".join(f"- {line}" for line in self.lines)


def check(
    pipeline: Callable[[], object],
    start: Run,
    goals: dict[str, str],
    tolerance: float = 1e-3,
    answer: str = "logits",
    required: bool = False,
    counters: Callable[[Run], dict] | None = None,
) -> Result:
    """Run a learner's pipeline and compare it with where the exercise started.

    Args:
        pipeline: the learner's function, without arguments, that returns a Dataset.
        start: an observed run of the slow pipeline; its answers are the right ones.
        goals: counter -> condition, such as `{"model_constructions": "== 1"}`.
        tolerance: largest absolute difference of two answers that count as the same.
        required: raise AssertionError unless done (for the executed solution).
        counters: adds counters of the caller's own to the run, as in `compare`.

    A failing pipeline, a forgotten `return` or a wrong answer gives a Result, never a traceback.
    """
    result = _check(pipeline, start, goals, tolerance, answer, counters)
    if required and not result.passed:
        raise AssertionError(f"the solution does not pass its own check: {result!r}")
    return result


def _check(pipeline, start, goals, tolerance, answer, counters) -> Result:
    try:
        run = measure.run(_must_return(pipeline), name="yours", answer=answer)
        run.extra |= counters(run) if counters else {}
    except _Empty:
        text = "Your function returns nothing yet. It should return a Dataset, one row per image."
        return Result("empty", [text])
    except Exception as error:  # the learner's code may fail in any way
        return Result("error", _explain(error))
    found = agree(start.answers, run.answers, tolerance)
    if not found.all_same or run.rows != start.rows:
        lines = [f"{found.images - found.same} of {found.images} images have another answer."]
        lines += [
            f"{name}: expected {how.replace('against', 'but got')}" for name, how in found.differing
        ]
        if run.rows != start.rows:
            lines.append(f"{run.rows} rows came out; there are {start.rows} images.")
        return Result("wrong answer", lines, run)
    needed = len(start.answers) if start.counter("images_through_model") else 0
    seen = run.counter("images_through_model")
    if seen < needed:
        text = (
            f"Only {seen} of {needed} images went through the model, yet all have the right answer."
        )
        return Result("too good to be true", [text, "Compute the answers, do not reuse them."], run)
    left = [
        f"{counter_name(counter)} is {counter_value(counter, run.counter(counter))}; the goal is "
        f"{condition} (at the start: {counter_value(counter, start.counter(counter))})."
        for counter, condition in goals.items()
        if not Condition(condition).holds(run.counter(counter))
    ]
    if left:
        return Result("not fixed yet", ["The answers are right.", *left], run)
    lines = [f"All {found.images} answers are right."]
    for counter in goals:
        before, after = (counter_value(counter, r.counter(counter)) for r in (start, run))
        lines.append(f"{counter_name(counter)}: {before} at the start, {after} now.")
    lines.append(
        f"{start.seconds:.1f} s at the start, {run.seconds:.1f} s now "
        f"({start.seconds / run.seconds:.1f}x; one run each, so take it with a grain of salt)."
    )
    return Result("done", lines, run)


class Guess:
    """A prediction beside what was measured."""

    def __init__(self, what: str, guessed, measured):
        self.what, self.guessed, self.measured = what, guessed, measured

    def __repr__(self) -> str:
        guessed, measured = (
            value if isinstance(value, str) else plots.short(value)
            for value in (self.guessed, self.measured)
        )
        return f"{self.what}: you wrote {guessed}, measured {measured}."

    def _repr_html_(self) -> str:
        return plots.panel("note", "Your prediction", [repr(self)])


def guess(what: str, guessed: float | str, measured: float | str) -> Guess:
    """Show a prediction that was written down beside what came out; nobody is graded on it."""
    return Guess(what, guessed, measured)


class _Empty(Exception):
    pass


def _must_return(pipeline):
    def call():
        result = pipeline()
        if result is None or result is ...:
            raise _Empty
        return result

    return call


def _explain(error: Exception) -> list[str]:
    """The cause of a failure in one or two lines: Ray wraps the learner's error in its own."""
    while getattr(error, "cause", None) is not None or error.__cause__ is not None:
        error = getattr(error, "cause", None) or error.__cause__
    text = str(error).strip().splitlines() or [""]
    return [
        f"Your pipeline stopped with {type(error).__name__}: {text[-1][:300]}",
        "Fix this first, then run the check again.",
    ]
