"""Naive against fixed: same answer, the counter that is the mistake, repeats, a record, a figure.

A comparison rests on two tiers. *Required*, checked on every machine: every image has an answer,
both pipelines give the same one within a stated tolerance, and the named counters are what they
should be on each side. *Shown*, never checked: times, rates, memory, utilization.
"""

import datetime
import json
import operator
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from helpers import catalog, measure
from helpers.measure import Run

_OPERATIONS = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class ComparisonError(AssertionError):
    """A claim of the page is not true here. The message says which, and what was found instead."""


@dataclass(frozen=True)
class Condition:
    """What a counter should be, such as "== 4" or ">= 1_000_000"."""

    text: str

    def __post_init__(self):
        sign, _, number = self.text.partition(" ")
        try:
            float(number.replace("_", ""))
            _OPERATIONS[sign]
        except (KeyError, ValueError):
            raise ValueError(
                f"a condition looks like '== 4' or '>= 10', not {self.text!r}"
            ) from None

    def holds(self, value: float) -> bool:
        sign, _, number = self.text.partition(" ")
        return _OPERATIONS[sign](value, float(number.replace("_", "")))


@dataclass(frozen=True)
class Evidence:
    """One counter and what it should be on each side."""

    counter: str
    naive: Condition
    fixed: Condition


@dataclass
class Agreement:
    """How the answers of two runs compare, matched by image."""

    images: int
    same: int  # images whose answers agree within the tolerance
    largest_difference: float
    tolerance: float
    top1_same: int | None  # None where an answer is not a vector of logits
    differing: list[tuple[str, str]]  # the first images that differ, and how

    @property
    def all_same(self) -> bool:
        return self.same == self.images


@dataclass
class Comparison:
    """The repeats of both sides and what was found. Shows itself as a table in a notebook."""

    id: str
    naive: list[Run]
    fixed: list[Run]
    evidence: list[Evidence]
    agreement: Agreement
    answers_expected: str
    provenance: dict
    labels: tuple[str, str] = ("naive", "fixed")
    notes: dict = field(default_factory=dict)

    @property
    def mistake(self) -> "catalog.Mistake":
        return catalog.MISTAKES[self.id]

    def values(self, side: str, counter: str) -> list[float]:
        """A counter over the repeats of `side` ("naive" or "fixed")."""
        return [run.counter(counter) for run in getattr(self, side)]

    def seconds(self, side: str) -> list[float]:
        return [run.seconds for run in getattr(self, side)]

    @property
    def speedup(self) -> float:
        """Best naive time over best fixed time; below 1, the fix costs time here."""
        return min(self.seconds("naive")) / min(self.seconds("fixed"))

    def finding(self) -> str:
        """One sentence: the counter on both sides, then the times."""
        first = self.evidence[0]
        naive, fixed = (self.values(side, first.counter)[-1] for side in ("naive", "fixed"))
        ratio = self.speedup
        if self.answers_expected != "same":
            effect = "the answers are what counts"
        elif len(self.naive) == 1:
            effect = "one run each, so no statement about time"
        elif ratio >= 1.1:
            effect = f"{ratio:.1f}x faster here"
        elif ratio <= 0.9:
            effect = f"{1 / ratio:.1f}x slower here"
        else:
            effect = "no clear difference in time here"
        before, after = (counter_value(first.counter, value) for value in (naive, fixed))
        naive_s, fixed_s = (min(self.seconds(side)) for side in ("naive", "fixed"))
        return (
            f"{self.id}: {counter_name(first.counter)} {before} before, {after} after; "
            f"{naive_s:.1f} s against {fixed_s:.1f} s ({effect})."
        )

    def plot(self):
        """The before/after figure, with its finding as text and the provenance below."""
        from helpers import plots

        return plots.before_after(self)

    def to_dict(self) -> dict:
        return {
            "id": self.id,
            "title": self.mistake.title,
            "family": self.mistake.family,
            "lesson": self.mistake.lesson,
            "evidence": [
                {
                    "counter": e.counter,
                    "naive_expected": e.naive.text,
                    "fixed_expected": e.fixed.text,
                    "naive": self.values("naive", e.counter),
                    "fixed": self.values("fixed", e.counter),
                }
                for e in self.evidence
            ],
            "answers": {
                "expected": self.answers_expected,
                "rows": {side: getattr(self, side)[-1].rows for side in ("naive", "fixed")},
                "images": self.agreement.images,
                "same": self.agreement.same,
                "tolerance": self.agreement.tolerance,
                "largest_difference": self.agreement.largest_difference,
            },
            "finding": self.finding(),
            "naive": [run.to_dict() for run in self.naive],
            "fixed": [run.to_dict() for run in self.fixed],
            "provenance": self.provenance,
        }

    def _repr_html_(self) -> str:
        from helpers import plots

        return plots.comparison_table(self)

    def __repr__(self) -> str:
        return self.finding()


def compare(
    id: str,
    naive: Callable[[], object],
    fixed: Callable[[], object],
    images,
    evidence: dict[str, tuple[str, str]],
    tolerance: float = 1e-3,
    answer: str = "logits",
    answers: str = "same",
    repeats: int | None = None,
    counters: Callable[[Run], dict] | None = None,
) -> Comparison:
    """Run both pipelines in turn, check the claim, record it.

    Args:
        id: a mistake of the catalog, such as "T2".
        naive, fixed: pipelines as `measure.run` takes them.
        images: the `data.ImageSource` they read; each image must have exactly one answer.
        evidence: counter -> (condition for naive, condition for fixed), such as
            `{"model_constructions": ("== 8", "== 1")}`. The first one is the headline.
        tolerance: largest absolute difference of two answers that count as the same, in the
            answers' own unit.
        answer: the column with each image's answer.
        answers: "same"; "different", for a mistake that *is* a wrong answer: the naive side must
            differ for at least one image; "rows", for a mistake that *is* lost or repeated rows:
            the naive side must not have exactly one answer for each image.
        repeats: runs of each side, alternating; default COURSE_REPEATS, else 3.
        counters: adds counters of the caller's own to each run.

    Raises: ComparisonError when an image has no answer, when the answers are not as expected (with
    the first images that differ), or when a counter is not (with its name, value and goal).
    """
    claims = [Evidence(c, Condition(n), Condition(f)) for c, (n, f) in evidence.items()]
    runs: dict[str, list[Run]] = {"naive": [], "fixed": []}
    count = repeats or default_repeats()
    with _Progress(id) as progress:
        for repeat in range(count):
            for side, pipeline in (("naive", naive), ("fixed", fixed)):
                progress.say(f"{side}, run {repeat + 1} of {count}")
                run = measure.run(pipeline, name=side, answer=answer)
                run.extra |= counters(run) if counters else {}
                _require_rows(id, run, images, wrong=answers == "rows" and side == "naive")
                runs[side].append(run)
        agreement = agree(runs["naive"][-1].answers, runs["fixed"][-1].answers, tolerance)
        _require_answers(id, agreement, answers)
        for side in runs:
            for claim in claims:
                _require_counter(id, side, claim, runs[side])
        result = Comparison(
            id, runs["naive"], runs["fixed"], claims, agreement, answers, provenance(images)
        )
        record(id, result.to_dict())
        progress.say(f"{result.finding().partition(': ')[2]}")
    return result


def agree(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> Agreement:
    """Compare two sets of answers image by image; an image that only one side has differs."""
    same, top1, largest, differing = 0, 0, 0.0, []
    logits = False
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            differing.append((name, "only one side has an answer"))
            continue
        x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
        if x.shape != y.shape:
            differing.append((name, f"shape {x.shape} against {y.shape}"))
            continue
        difference = float(np.max(np.abs(x - y), initial=0.0))
        if np.isnan(difference):
            differing.append((name, "not a number"))
            continue
        largest = max(largest, difference)
        if x.ndim == 1 and x.size > 1:
            logits = True
            top1 += int(np.argmax(x) == np.argmax(y))
        if difference <= tolerance:
            same += 1
        else:
            at = np.unravel_index(np.argmax(np.abs(x - y)), x.shape)
            differing.append((name, f"{x[at]:.5g} against {y[at]:.5g}"))
    images = len(a.keys() | b.keys())
    return Agreement(images, same, largest, tolerance, top1 if logits else None, differing[:5])


def _require_rows(id: str, run: Run, images, wrong: bool) -> None:
    """One answer for each image; `wrong` for a mistake that consists in having something else."""
    expected = {measure.short_key(path) for path in images.paths}
    lost, extra = expected - run.answers.keys(), run.answers.keys() - expected
    complete = not lost and not extra and run.rows == len(expected)
    if wrong and complete:
        raise ComparisonError(
            f"{id}: the {run.name} pipeline should lose or repeat rows, but it has exactly one "
            f"answer for each of the {len(expected)} images"
        )
    if not wrong and not complete:
        some = ", ".join(sorted(lost or extra)[:3])
        raise ComparisonError(
            f"{id}: the {run.name} pipeline returned {run.rows} rows for {len(expected)} images: "
            f"{len(lost)} images lost, {len(extra)} unknown, "
            f"{run.rows - len(run.answers)} rows repeated" + (f" (first: {some})" if some else "")
        )


def _require_answers(id: str, agreement: Agreement, expected: str) -> None:
    if expected not in ("same", "different", "rows"):
        raise ValueError(f'answers is "same", "different" or "rows", not {expected!r}')
    if expected == "same" and not agreement.all_same:
        lines = "\n".join(f"  {name}: {how}" for name, how in agreement.differing)
        raise ComparisonError(
            f"{id}: naive and fixed disagree on {agreement.images - agreement.same} of "
            f"{agreement.images} images by more than {agreement.tolerance:g} "
            f"(naive against fixed):\n{lines}"
        )
    if expected == "different" and agreement.all_same:
        raise ComparisonError(
            f"{id}: the naive pipeline should give wrong answers, but all {agreement.images} agree "
            f"within {agreement.tolerance:g}"
        )


def _require_counter(id: str, side: str, claim: Evidence, runs: list[Run]) -> None:
    condition = getattr(claim, side)
    for repeat, run in enumerate(runs, 1):
        value = run.counter(claim.counter)
        if not condition.holds(value):
            raise ComparisonError(
                f"{id}: counter {claim.counter!r} of the {run.name or side} pipeline is {value:,}; "
                f"it should be {condition.text} (run {repeat} of {len(runs)})"
            )


def require(id: str, run: Run, evidence: dict[str, str]) -> None:
    """Check counters of a single run: counter -> condition. Raises ComparisonError."""
    for counter, condition in evidence.items():
        claim = Evidence(counter, Condition(condition), Condition(condition))
        _require_counter(id, "naive", claim, [run])


def default_repeats() -> int:
    return max(1, int(os.environ.get("COURSE_REPEATS", "3")))


def results_folder() -> Path:
    """Where records go: COURSE_RESULTS, else `_build/results` of the project."""
    default = Path(__file__).resolve().parent.parent / "_build" / "results"
    return Path(os.environ.get("COURSE_RESULTS", default))


def record(name: str, content: dict) -> Path:
    """Write one result as `<name>.json`, whole or not at all."""
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.{os.getpid()}.part"
    part.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    return part.replace(folder / f"{name}.json")


def load_results(folder: Path | None = None) -> dict[str, dict]:
    """All records of a folder: `{name: content}`; empty when there are none."""
    files = sorted((folder or results_folder()).glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"not JSON: {type(value).__name__}")


def provenance(images=None) -> dict:
    """What a result was measured on: machine, versions, images, weights, date, commit."""
    from helpers import device, model

    packages = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow")
    return {
        "device": device.detect().to_dict(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "images": images.to_dict() if images is not None else None,
        "weights": model.weights().to_dict(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def short_provenance(provenance: dict) -> str:
    """One line for figures."""
    images = provenance["images"]
    parts = [
        provenance["device"]["summary"],
        f"Ray {provenance['versions']['ray']}",
        f"torch {provenance['versions']['torch'].partition('+')[0]}",
        images["description"] if images else "",
        provenance["weights"]["summary"],
        provenance["date"][:10],
        f"commit {provenance['commit']}" if provenance["commit"] else "",
    ]
    return " · ".join(part for part in parts if part)


def _commit() -> str | None:
    """The commit of the working tree, with a + when it was changed since; None outside git."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class _Progress:
    """Says how far a comparison is: in the notebook, and in the file COURSE_PROGRESS."""

    def __init__(self, id: str):
        self._id = id
        self._start = time.monotonic()
        self._handle = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        from helpers import plots

        plots.clear_status(self._handle)

    def say(self, text: str) -> None:
        from helpers import plots

        line = f"{self._id}: {text}"
        self._handle = plots.show_status(line, self._handle)
        file = os.environ.get("COURSE_PROGRESS")
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            lesson = catalog.MISTAKES[self._id].lesson if self._id in catalog.MISTAKES else ""
            with open(file, "a") as out:
                out.write(f"  {lesson} {line} ({time.monotonic() - self._start:.0f} s)\n")


def counter_name(counter: str) -> str:
    """A counter's name for people."""
    kind, _, text = counter.partition(":")
    words = kind.replace("_", " ")
    if kind == "bytes_out":
        return f"bytes leaving {text}"
    if kind == "operators" and text:
        return f"operators with {text}"
    if kind == "calls":
        return f"calls of {text}"
    return f"{words} {text}".strip()


def counter_value(counter: str, value: float) -> str:
    """A counter's value for people: bytes as MB."""
    if "bytes" in counter:
        if value < 1e5:
            return f"{value / 1e3:,.1f} kB" if value else "0"
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
