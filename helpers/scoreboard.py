"""The tables and figures of the book's own pages: the lessons, the mistake index, the scoreboard.

Nothing here measures. The lessons say their own minutes, the catalog has the mistakes, and the
results are what `compare.record` wrote, for this build and for the machines in `book/recorded/`.
Without results each function says so in plain words.
"""

import html
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from helpers import catalog, plots
from helpers.compare import counter_name, counter_value, load_results

LIVE = "this build"
NOTHING_YET = "No results yet: the lessons have not run in this build. `make book` runs them."
_NEEDED = {"id", "title", "lesson", "evidence", "answers", "naive", "fixed", "provenance"}


class Html:
    """HTML that shows itself on a page, with the same in plain text for everywhere else."""

    def __init__(self, markup: str, text: str = ""):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text or re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", self.markup)).strip()


@dataclass(frozen=True)
class Result:
    """One recorded comparison of one machine, as `Comparison.to_dict` wrote it."""

    content: dict

    @property
    def id(self) -> str:
        return self.content["id"]

    @property
    def title(self) -> str:
        return self.content["title"]

    @property
    def provenance(self) -> dict:
        return self.content["provenance"]

    @property
    def about_answers(self) -> bool:
        """The mistake is a wrong answer or a wrong number of rows: its time is beside the point."""
        return self.content["answers"]["expected"] != "same"

    @property
    def wrong_answers(self) -> str:
        """What the naive side of such a mistake gets wrong."""
        found = self.content["answers"]
        if found["expected"] == "rows":
            rows = found["rows"]["naive"]
            return f"{rows} rows come out for {found['images']} images"
        return f"{found['images'] - found['same']} of {found['images']} answers are wrong"

    def values(self, side: str, name: str) -> list:
        """What each repeat of "naive" or "fixed" has under `name`, such as "seconds"."""
        return [run.get(name) for run in self.content[side]]

    @property
    def speedup(self) -> float:
        """Best naive time over best fixed time; below 1, the fix costs time."""
        return min(self.values("naive", "seconds")) / min(self.values("fixed", "seconds"))

    @property
    def overlapping(self) -> bool:
        """Whether the times of the two sides overlap; their first runs count only if alone."""
        warm = [self.values(side, "seconds") for side in ("naive", "fixed")]
        naive, fixed = (runs[1:] or runs for runs in warm)
        return max(fixed) >= min(naive) and max(naive) >= min(fixed)

    @property
    def effect(self) -> str:
        """What the fix did to the time: "saves", "costs" or "unclear"."""
        if self.speedup >= 1.1 and not self.overlapping:
            return "saves"
        return "costs" if self.speedup <= 0.9 and not self.overlapping else "unclear"

    @property
    def effect_text(self) -> str:
        words = {
            "saves": f"{self.speedup:.1f}x faster",
            "costs": f"{1 / self.speedup:.1f}x slower",
            "unclear": "no clear difference",
        }
        return words[self.effect]


@dataclass(frozen=True)
class Machine:
    """All comparisons of one machine, the costliest mistake first."""

    name: str
    results: tuple[Result, ...]
    runs: tuple[dict, ...] = ()

    @property
    def timed(self) -> list[Result]:
        return [result for result in self.results if not result.about_answers]

    def get(self, id: str) -> Result | None:
        return next((result for result in self.results if result.id == id), None)


def machine(name: str, records: dict[str, dict]) -> Machine:
    """The comparisons among `records`, which are as `compare.load_results` gives them.

    Records of other kinds, such as a lesson's measured ceiling, are left out.
    Raises: ValueError for a comparison that lacks something, with its name and what it lacks.
    """
    found = []
    for file, content in records.items():
        if not isinstance(content, dict) or not {"naive", "fixed"} <= content.keys():
            continue
        missing = _NEEDED - content.keys()
        if missing or not (content["naive"] and content["fixed"]):
            lacks = ", ".join(sorted(missing)) or "runs"
            raise ValueError(f"the record {file}.json of {name} lacks {lacks}")
        found.append(Result(content))
    found.sort(key=lambda result: (result.about_answers, -result.speedup, result.id))
    runs = tuple(run for r in found for side in ("naive", "fixed") for run in r.content[side])
    return Machine(name, tuple(found), runs)


def live(folder: Path | None = None) -> Machine:
    """This build's results: those in `folder`, else in `compare.results_folder()`."""
    return machine(LIVE, load_results(folder))


def recorded(folder: str | Path) -> list[Machine]:
    """One machine per folder in `folder` that holds comparisons, by name; [] when there are none.

    Raises: ValueError for a file that is not JSON or lacks something, with the machine's name.
    """
    found = []
    for sub in sorted(Path(folder).glob("*/")):
        if not sub.is_dir():
            continue
        try:
            entry = machine(sub.name, load_results(sub))
        except json.JSONDecodeError as error:
            raise ValueError(f"a record of {sub.name} is not JSON: {error}") from error
        if entry.results:
            found.append(entry)
    return found


# --- the lessons -------------------------------------------------------------------------------


_MINUTES = re.compile(r"read\W+(\d+)\W+run\W+(\d+)\W+exercise\W+(\d+)", re.IGNORECASE)


def lessons(folder: str | Path) -> Html:
    """The lessons in order, with links and with the minutes that each of them states.

    Raises: ValueError for a lesson without a title or without its minutes.
    """
    rows, totals = [], [0, 0, 0]
    for path in sorted(Path(folder).glob("[0-9]*.ipynb")):
        title, minutes = _title_and_minutes(path)
        totals = [total + n for total, n in zip(totals, minutes, strict=True)]
        link = f'<a href="../lessons/{path.stem}.html">{path.stem[:2]} · {_prose(title)}</a>'
        rows.append([link, *minutes, sum(minutes)])
    if not rows:
        return _note("There are no lessons in this copy of the course.")
    rows.append(["<b>All lessons</b>", *totals, sum(totals)])
    heads = ("lesson", "read", "run", "exercise", "minutes in all")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return Html(
        '<div class="course-table"><table class="course-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _title_and_minutes(path: Path) -> tuple[str, list[int]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", prose, re.MULTILINE)
    minutes = _MINUTES.search(prose)
    if not title or not minutes:
        raise ValueError(
            f"{path.name} must have a title and a line such as "
            "'**Minutes**: read 15 · run 5 · exercise 10'"
        )
    return title[1].strip(), [int(n) for n in minutes.groups()]


# --- the index of mistakes ---------------------------------------------------------------------


def mistake_index() -> Html:
    """The catalog as a table with a filter box. Without JavaScript the table is simply whole."""
    rows = "".join(_mistake_row(mistake) for mistake in catalog.MISTAKES.values())
    heads = ("What you see", "Why it happens", "Counter that proves it", "What to change")
    head = "".join(f'<th role="columnheader" scope="col">{text}</th>' for text in heads)
    text = "\n".join(f"{m.id}: {m.symptom} -> {m.knob}" for m in catalog.MISTAKES.values())
    markup = (
        f"<style>{_INDEX_STYLE}</style>"
        '<div class="mistakes"><p class="mistakes-filter" hidden>'
        '<label for="mistakes-query">Filter by any words, such as <em>memory</em> or '
        "<em>GPU</em></label>"
        '<input id="mistakes-query" type="search" autocomplete="off" '
        'aria-controls="mistakes-table">'
        '<span role="status" aria-live="polite"></span></p>'
        f'<table id="mistakes-table" role="table"><thead role="rowgroup"><tr role="row">{head}'
        f'</tr></thead><tbody role="rowgroup">{rows}</tbody></table></div>'
        f"<script>{_INDEX_SCRIPT}</script>"
    )
    return Html(markup, text)


def original_labels():
    """Where each label of the published template went: a mistake of this course, or the reason."""
    rows = []
    for label in catalog.ORIGINAL_LABELS:
        here = [
            f"{id} · {catalog.MISTAKES[id].title}" for id in label.ids if id in catalog.MISTAKES
        ]
        rows.append([label.name, label.about, "; ".join([*here, *filter(None, [label.reason])])])
    return plots.Table(["label", "about", "in this course"], rows)


def not_seen_by_the_doctor():
    """The mistakes that `helpers.doctor` cannot see from plan, statistics and code, and why."""
    from helpers.doctor.rules import CANNOT_SEE

    rows = []
    for id, reason in CANNOT_SEE.items():
        title = catalog.MISTAKES[id].title if id in catalog.MISTAKES else ""
        rows.append([f"{id} · {title}" if title else id, reason])
    return plots.Table(["mistake", "why not"], rows)


def _mistake_row(mistake: catalog.Mistake) -> str:
    from helpers.doctor import rules

    seen = rules.catalog_column(mistake.id)
    link = f"../lessons/{mistake.lesson}.html#{mistake.id.lower()}"
    cells = {
        "What you see": f"{_prose(mistake.symptom)}"
        f'<a href="{link}">{mistake.id} · {_prose(mistake.title)}</a>',
        "Why it happens": _prose(mistake.cause),
        "Counter that proves it": f"{_prose(mistake.evidence)}"
        f'<span class="no-help"><b>The doctor:</b> {_prose(seen)}</span>',
        "What to change": f"{_prose(mistake.knob)}"
        f'<span class="no-help"><b>Does not help:</b> {_prose(mistake.no_help)}</span>',
    }
    tds = "".join(
        f'<td role="cell" data-label="{label}"><div>{cell}</div></td>'
        for label, cell in cells.items()
    )
    return f'<tr role="row" data-words="{mistake.family}">{tds}</tr>'


def _prose(text: str) -> str:
    """Escaped text with `code` in backticks marked up."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


_INDEX_STYLE = """
.mistakes table { width: 100%; border-collapse: collapse; font-size: .88em; margin: .5rem 0 1.5rem }
.mistakes th, .mistakes td { text-align: left; vertical-align: top; padding: .6em .7em;
  border-bottom: 1px solid var(--pst-color-border, #c9c9c9); overflow-wrap: anywhere }
.mistakes td { width: 25% }
.mistakes th { border-bottom-width: 2px }
.mistakes td a { display: block; margin-top: .5em }
.mistakes .no-help { display: block; margin-top: .5em }
.mistakes-filter:not([hidden]) { display: flex; flex-wrap: wrap; gap: .4em 1em;
  align-items: center }
.mistakes-filter input { flex: 1 1 14em; min-width: 0; padding: .35em .6em; font: inherit;
  color: inherit; background: var(--pst-color-surface, transparent);
  border: 1px solid var(--pst-color-text-muted, #767676); border-radius: 4px }
@media (max-width: 760px) {
  .mistakes thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%) }
  .mistakes table, .mistakes tbody { display: block }
  .mistakes tr:not([hidden]) { display: block; padding: .6em 0;
    border-bottom: 2px solid var(--pst-color-border, #c9c9c9) }
  .mistakes td { display: block; width: auto; border: 0; padding: .25em 0 }
  .mistakes td::before { content: attr(data-label); display: block; font-size: .85em;
    font-weight: 600 }
}
"""

_INDEX_SCRIPT = """
(function () {
  var box = document.querySelector(".mistakes-filter");
  if (!box) { return; }
  var input = box.querySelector("input"), said = box.querySelector("[role=status]");
  var rows = [].slice.call(document.querySelectorAll("#mistakes-table tbody tr"));
  function filter() {
    var words = input.value.toLowerCase().split(/\\s+/).filter(Boolean), shown = 0;
    rows.forEach(function (row) {
      var text = (row.textContent + " " + row.dataset.words).toLowerCase();
      row.hidden = !words.every(function (word) { return text.indexOf(word) >= 0; });
      if (!row.hidden) { shown += 1; }
    });
    said.textContent = shown + " of " + rows.length + " mistakes";
  }
  box.hidden = false;
  input.addEventListener("input", filter);
  filter();
})();
"""


# --- the scoreboard ----------------------------------------------------------------------------


def summary(machine: Machine) -> str:
    """What the fixes did to the time on this machine, in two or three sentences."""
    if not machine.results:
        return NOTHING_YET
    groups = {kind: [r for r in machine.timed if r.effect == kind] for kind in _KINDS}
    parts = [
        f"{machine.name[0].upper()}{machine.name[1:]}: {len(machine.results)} mistakes measured."
    ]
    if groups["saves"]:
        names = _list(f"{r.id} {r.speedup:.1f}x" for r in groups["saves"])
        parts.append(f"The fix saves time for {names}.")
    if groups["unclear"]:
        names = _list(r.id for r in groups["unclear"])
        parts.append(f"It makes no clear difference in time for {names}.")
    if groups["costs"]:
        names = _list(f"{r.id} ({r.effect_text})" for r in reversed(groups["costs"]))
        parts.append(f"It costs time here for {names}.")
    for result in machine.results:
        if result.about_answers:
            parts.append(
                f"{result.id} is not ranked by time: without the fix, {result.wrong_answers}."
            )
    if machine.timed and _repeats(machine)[0] == 1:
        parts.append("With one run per side there is no spread to judge the times by.")
    return " ".join(parts)


_KINDS = ("saves", "unclear", "costs")


def times_figure(machine: Machine):
    """Every run as a dot, in multiples of the fastest fixed run; the costliest mistake on top.

    A `Figure`; or `Html` that says so when there is nothing to plot.
    """
    results = machine.timed
    if not results:
        return _note("No results yet.")
    figure, axes = plots.subplots(figsize=(6.6, 1.3 + 0.55 * len(results)))
    for y, result in zip(range(len(results) - 1, -1, -1), results, strict=True):
        unit = min(result.values("fixed", "seconds"))
        for side, shift, marker in (("naive", 0.13, "o"), ("fixed", -0.13, "s")):
            for i, seconds in enumerate(result.values(side, "seconds")):
                first = i == 0 and len(result.values(side, "seconds")) > 1
                color = plots.COLORS[side]
                face = "white" if first else color
                axes.plot(seconds / unit, y + shift, marker, ms=7, mfc=face, mec=color, mew=1.6)
        axes.annotate(
            result.effect_text,
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            annotation_clip=False,
        )
    labels = [textwrap.fill(f"{r.id} · {r.title}".replace("`", ""), 26) for r in results]
    axes.set_yticks(range(len(results) - 1, -1, -1), labels, fontsize=10)
    axes.set_ylim(-0.6, len(results) - 0.4)
    _ratio_axis(axes)
    axes.axvline(1, color="black", lw=1)
    axes.set_xlabel("times the fastest fixed run")
    for side, marker in (("naive", "o"), ("fixed", "s")):
        axes.plot([], [], marker, ms=7, color=plots.COLORS[side], label=side)
    axes.plot([], [], "o", ms=7, mfc="white", mec="black", label="first run")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10)
    return plots.Figure(figure, summary(machine), short_provenance(machine))


def _ratio_axis(axes) -> None:
    """A logarithmic axis of ratios: twice as slow is as far from 1 as twice as fast."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 2.2)
    steps = [s * 10**e for e in range(-2, 5) for s in (1, 2, 5)]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.grid(axis="y", visible=False)


def counters_table(machine: Machine):
    """The checked claims: each counter on both sides, what was required, and the answers."""
    if not machine.results:
        return _note("No results yet.")
    rows = []
    for result in sorted(machine.results, key=_by_id):
        for claim in result.content["evidence"]:
            counter = claim["counter"]
            sides = [
                counter_value(counter, claim[side][-1]) + _bound(counter, claim[f"{side}_expected"])
                for side in ("naive", "fixed")
            ]
            rows.append([result.id, counter_name(counter), *sides, _answers(result)])
    header = ["", "counter", "naive", "fixed", "same answers"]
    return plots.Table(header, rows, f"Checked on every run: {machine.name}")


def times_table(machine: Machine):
    """Seconds of both sides, the middle and the range of the repeats; costliest mistake first."""
    if not machine.results:
        return _note("No results yet.")
    rows = []
    for result in machine.results:
        cells = [_spread(result.values(side, "seconds")) for side in ("naive", "fixed")]
        effect = "about the answer" if result.about_answers else result.effect_text
        rows.append([f"{result.id} · {result.title}", *cells, effect])
    header = ["mistake", "naive, s", "fixed, s", "with the fix"]
    return plots.Table(header, rows, f"Time, shown and never checked: {machine.name}")


def memory_table(machine: Machine):
    """Peak memory in MB of the object store and of all workers, naive and fixed."""
    if not machine.results:
        return _note("No results yet.")
    peaks = ("peak_object_store_bytes", "peak_worker_bytes")
    rows = [
        [result.id]
        + [_middle(result.values(side, name), 1e6) for name in peaks for side in ("naive", "fixed")]
        for result in sorted(machine.results, key=_by_id)
    ]
    header = ["", "object store, naive", "fixed", "all workers, naive", "fixed"]
    return plots.Table(header, rows, f"Peak memory in MB, shown and never checked: {machine.name}")


def across_machines(machines: list[Machine]):
    """Per mistake, what its fix did to the time on each machine."""
    ids = sorted({r.id for m in machines for r in m.timed}, key=_id_order)
    if not ids:
        return _note("No results yet.")
    titles = {r.id: r.title for m in reversed(machines) for r in m.timed}
    rows = []
    for id in ids:
        found = [m.get(id) for m in machines]
        rows.append(
            [f"{id} · {titles[id]}", *(r.effect_text if r else "not measured" for r in found)]
        )
    return plots.Table(["mistake", *(m.name for m in machines)], rows, "Effect of the fix on time")


def provenance_table(machines: list[Machine]):
    """What each machine's results were measured on. Where results differ, all values are listed."""
    known = [m for m in machines if m.results]
    if not known:
        return _note("No results yet.")
    columns = [_provenance(m) for m in known]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return plots.Table(["", *(m.name for m in known)], rows)


def measured_on(machine: Machine) -> Html:
    """The provenance of one machine as a sentence and a table, for the first page."""
    if not machine.results:
        return _note(NOTHING_YET)
    facts = _provenance(machine)
    warning = _caveats(machine)
    table = plots.Table(["what", "measured on"], facts.items())._repr_html_()
    return Html(f"{_note(warning).markup if warning else ''}{table}", repr(facts))


def sampling_cost(machine: Machine) -> str:
    """What watching cost: the sampler's own CPU time, as a share of one core."""
    costs = [run["sampling_cost"] for run in machine.runs if run.get("sampling_cost") is not None]
    if not costs:
        return NOTHING_YET
    return (
        f"In {machine.name}, {len(costs)} runs were watched. The sampler used "
        f"{median(costs):.2%} of one core in the middle run and {max(costs):.2%} in the costliest."
    )


def short_provenance(machine: Machine) -> str:
    """One line for figures: device, versions, images, weights, date, commit."""
    facts = _provenance(machine)
    keys = ("device", "Ray", "torch", "images", "weights", "date", "commit")
    prefix = {"Ray": "Ray ", "torch": "torch ", "commit": "commit "}
    return " · ".join(prefix.get(k, "") + facts[k] for k in keys if facts[k] != "unknown")


def show(text: str) -> Html:
    """One plain paragraph, `code` in backticks marked up."""
    return Html(f"<p>{_prose(text)}</p>", text)


def _provenance(machine: Machine) -> dict[str, str]:
    """Each fact of a machine's results, all distinct values joined."""
    all_of = [result.provenance for result in machine.results]
    facts = {
        "device": [_short(p.get("device")) for p in all_of],
        "system": [_at(p, "system") for p in all_of],
        "Python": [_at(p, "python") for p in all_of],
        "Ray": [_at(p, "versions", "ray") for p in all_of],
        "torch": [(_at(p, "versions", "torch") or "").partition("+")[0] for p in all_of],
        "images": [_short(p.get("images")) for p in all_of],
        "weights": [_short(p.get("weights")) for p in all_of],
        "runs per side": ["–".join(str(n) for n in dict.fromkeys(_repeats(machine)))],
        "date": [(_at(p, "date") or "")[:10] for p in all_of],
        "commit": [_at(p, "commit") for p in all_of],
    }
    return {
        name: "; ".join(dict.fromkeys(str(v) for v in values if v)) or "unknown"
        for name, values in facts.items()
    }


def _caveats(machine: Machine) -> str:
    """What a reader must know about the data and the weights before believing a label."""
    kinds = {_at(r.provenance, "images", "kind") for r in machine.results}
    text = []
    if "generated" in kinds:
        text.append("The images are a generated sample, not photographs.")
    if any(_at(r.provenance, "weights", "meaningful") is False for r in machine.results):
        text.append("The weights are a stand-in: the labels mean nothing, the work is the same.")
    return " ".join(text)


def _at(content, *keys):
    """`content[key][key]...`, None where a step is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _short(content: dict | None) -> str | None:
    """The short form that a device, an image source or weights have of themselves."""
    return _at(content, "summary") or _at(content, "description")


def _repeats(machine: Machine) -> tuple[int, int]:
    """Fewest and most runs per side."""
    counts = [len(r.content[side]) for r in machine.results for side in ("naive", "fixed")]
    return min(counts), max(counts)


def _answers(result: Result) -> str:
    found = result.content["answers"]
    if result.about_answers:
        return f"no, that is the mistake: {result.wrong_answers}"
    return f"{found['same']} of {found['images']}"


def _bound(counter: str, expected: str) -> str:
    """A condition such as ">= 1_000_000" for people, " (at least 1.0 MB)"; "" for an exact one."""
    sign, _, number = expected.partition(" ")
    words = {"!=": "not", ">": "over", "<": "under", ">=": "at least", "<=": "at most"}
    if sign == "==":
        return ""
    return f" ({words[sign]} {counter_value(counter, float(number.replace('_', '')))})"


def _spread(values: list) -> str:
    """The middle of the repeats, and their range where there are several."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return _middle(known)
    low, high = (_middle([edge]) for edge in (min(known), max(known)))
    return f"{_middle(known)} ({low} to {high})"


def _middle(values: list, unit: float = 1) -> str:
    known = [value / unit for value in values if value is not None]
    if not known:
        return "unknown"
    return f"{median(known):,.0f}" if median(known) >= 100 else f"{median(known):,.1f}"


def _list(parts) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _id_order(id: str) -> tuple[int, int]:
    """T2 before T10, and the families in the order of the course."""
    family, number = id[:1], re.sub(r"\D", "", id)
    return "ITROP".find(family), int(number or 0)


def _by_id(result: Result) -> tuple[int, int]:
    return _id_order(result.id)


def _note(text: str) -> Html:
    return Html(f"<p><strong>{_prose(text)}</strong></p>", text)
