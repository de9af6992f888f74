"""A measured grid that the reader can move through, by sliders, in a notebook and on the site.

Nothing is computed when a slider moves. The grid was measured before; a slider only picks a point
of it. In a notebook the sliders are ipywidgets. On the site they are plain HTML with a few lines of
script inside the page, which need no kernel and no network; without scripts the whole grid is still
there as a table.
"""

import hashlib
import html
import json
import math

from helpers import plots


def explorer(
    axes: dict[str, list],
    runs: dict[tuple, list[float]],
    value: str,
    title: str,
    finding: str,
    provenance: str = "",
    lower_is_better: bool = False,
) -> "Explorer":
    """Sliders over a grid of measurements.

    Args:
        axes: one or two of them, name -> the values on it in order, such as
            `{"threads": [1, 2], "actors": [1, 2, 4]}`.
        runs: point of the grid, as a tuple in the order of the axes -> the repeats measured there.
            Points may be missing: what was not measured is said to be so.
        value: what the repeats are, with the unit, such as "images/s".
        lower_is_better: of seconds or bytes, say.

    Raises: ValueError for more than two axes, a point that is not on the grid, or no point at all.
    """
    return Explorer(axes, runs, value, title, finding, provenance, lower_is_better)


class Explorer:
    """Shows itself; made by `explorer`."""

    def __init__(self, axes, runs, value, title, finding, provenance, lower_is_better):
        if len(axes) not in (1, 2):
            raise ValueError(f"one or two axes, not {len(axes)}")
        choices = [list(values) for values in axes.values()]
        for point in runs:
            inside = len(point) == len(choices)
            if not inside or any(at not in on for at, on in zip(point, choices, strict=True)):
                raise ValueError(f"{point!r} is not on the grid {axes}")
        self.names, self.choices, self.value = list(axes), choices, value
        self.title, self.finding, self.provenance = title, finding, provenance
        self._best_of = min if lower_is_better else max
        self.runs = {point: list(found) for point, found in runs.items() if len(found)}
        if not self.runs:
            raise ValueError("nothing was measured")
        self._tops = {point: self._best_of(found) for point, found in self.runs.items()}
        self.best = self._best_of(self._tops, key=self._tops.get)

    def describe(self, point: tuple) -> str:
        """One point in words: its value, the range of the repeats, how far it is from the best."""
        named = zip(self.names, point, strict=True)
        at = ", ".join(f"{name} {_text(value)}" for name, value in named)
        if point not in self.runs:
            return f"{at}: not measured"
        found = self.runs[point]
        text = f"{at}: {plots.short(self._tops[point])} {self.value}"
        if len(found) > 1:
            low, high = (plots.short(edge) for edge in (min(found), max(found)))
            text += f" (best of {len(found)} runs, {low} to {high})"
        if point == self.best:
            return f"{text}, the best of this grid"
        top = self._tops[self.best]
        if not top:
            return text
        return f"{text}, {100 * self._tops[point] / top:.0f} % of the best ({plots.short(top)})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = {"text/plain": repr(self), "text/html": self._html()}
        if plots._in_notebook():
            bundle |= self._widgets()._repr_mimebundle_()
            bundle["text/plain"] = repr(self)
        return bundle

    def __repr__(self) -> str:
        return f"{self.title}: {self.finding}"

    # --- in a notebook ---------------------------------------------------------------------------

    def _widgets(self):
        import ipywidgets as widgets

        sliders = [
            widgets.SelectionSlider(
                options=[(_text(v), v) for v in on],
                value=at,
                description=name,
                style={"description_width": "initial"},
                layout={"width": "28em"},
            )
            for name, on, at in zip(self.names, self.choices, self.best, strict=True)
        ]
        said = widgets.HTML()

        def show(_=None):
            said.value = html.escape(self.describe(tuple(slider.value for slider in sliders)))

        for slider in sliders:
            slider.observe(show, "value")
        show()
        head = widgets.HTML(f"<b>{html.escape(self.title)}</b>")
        return widgets.VBox([head, *sliders, said, widgets.HTML(self._table())])

    # --- on the site -----------------------------------------------------------------------------

    def _html(self) -> str:
        key = "explorer-" + hashlib.sha1(f"{self.title}{self.runs}".encode()).hexdigest()[:10]
        sliders = "".join(
            _slider(name, [_text(v) for v in on], on.index(at))
            for name, on, at in zip(self.names, self.choices, self.best, strict=True)
        )
        note = f"<br><small>{html.escape(self.provenance)}</small>" if self.provenance else ""
        return (
            f'<div class="course-explorer" id="{key}"><strong>{html.escape(self.title)}</strong>'
            f'<div class="sliders" hidden>{sliders}</div>'
            f'<p class="said" role="status" aria-live="polite">'
            f"{html.escape(self.describe(self.best))}</p>{self._table()}"
            f"<p>{html.escape(self.finding)}{note}</p></div>"
            f'<script>({_SCRIPT})("{key}");</script>'
        )

    def _table(self) -> str:
        """The grid: the first axis downwards, the second one across."""
        rows_name, rows = self.names[0], self.choices[0]
        columns = self.choices[1] if len(self.choices) == 2 else [None]
        corner = f"{rows_name} ↓" + (f" · {self.names[1]} →" if len(self.names) == 2 else "")
        heads = [_text(c) for c in columns] if columns != [None] else [self.value]
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in (corner, *heads))
        body = ""
        for row in rows:
            points = [(row,) if column is None else (row, column) for column in columns]
            cells = "".join(self._cell(point) for point in points)
            body += f'<tr><th scope="row">{_text(row)}</th>{cells}</tr>'
        caption = f"<caption>{html.escape(self.value)}</caption>" if columns != [None] else ""
        return (
            f'<div class="course-table"><table>{caption}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _cell(self, point: tuple) -> str:
        at = ",".join(str(on.index(v)) for on, v in zip(self.choices, point, strict=True))
        words = html.escape(self.describe(point), quote=True)
        if point not in self.runs:
            return f'<td data-at="{at}" data-words="{words}">–</td>'
        largest = max(self._tops.values())
        share = self._tops[point] / largest if largest and math.isfinite(largest) else 0
        chosen = ' class="chosen"' if point == self.best else ""
        shown = plots.short(self._tops[point])
        return (
            f'<td{chosen} data-at="{at}" data-words="{words}" '
            f'style="--share: {max(share, 0):.3f}">{shown}</td>'
        )


def _slider(name: str, values: list[str], at: int) -> str:
    listed = html.escape(json.dumps(values), quote=True)
    return (
        f'<label>{html.escape(name)} <input type="range" min="0" max="{len(values) - 1}" step="1" '
        f'value="{at}" data-values="{listed}" aria-valuetext="{values[at]}">'
        f"<output>{values[at]}</output></label>"
    )


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_SCRIPT = """function (id) {
  var box = document.getElementById(id);
  if (!box) { return; }
  var inputs = [].slice.call(box.querySelectorAll("input")), said = box.querySelector(".said");
  function show() {
    var at = inputs.map(function (input) {
      var text = JSON.parse(input.dataset.values)[input.value];
      input.nextElementSibling.textContent = text;
      input.setAttribute("aria-valuetext", text);
      return input.value;
    }).join(",");
    box.querySelectorAll("td").forEach(function (cell) {
      cell.classList.toggle("chosen", cell.dataset.at === at);
      if (cell.dataset.at === at) { said.textContent = cell.dataset.words; }
    });
  }
  inputs.forEach(function (input) { input.addEventListener("input", show); });
  box.querySelector(".sliders").hidden = false;
  show();
}"""
