"""Every figure and table of the course, in one style.

Figures go to the page as HTML with the image inside: the alt text can then state what was found in
this run, and the page needs no other file. Colors are from the Okabe-Ito set, which people with any
common color vision can tell apart; shapes and labels repeat what the color says.
"""

import base64
import html
import io
import re

NAIVE = "#D55E00"
FIXED = "#0072B2"
OTHER = "#009E73"
GREY = "#6b7280"
COLORS = {"naive": NAIVE, "fixed": FIXED}
_STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}


class Figure:
    """A finished figure: shows itself with its finding as alt text and caption."""

    def __init__(self, figure, finding: str, provenance: str = ""):
        import matplotlib.pyplot as plt

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(figure)  # or the notebook shows it a second time
        self.png = buffer.getvalue()
        self.finding = finding
        self.provenance = provenance

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        alt = html.escape(self.finding, quote=True)
        note = f'<br><small class="course-provenance">{html.escape(self.provenance)}</small>'
        return (
            f'<figure class="course-figure"><img alt="{alt}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(self.finding)}{note if self.provenance else ''}</figcaption>"
            "</figure>"
        )

    def __repr__(self) -> str:
        return self.finding


def subplots(*args, **kwargs):
    """`matplotlib.pyplot.subplots` in the style of the course (for figures of a lesson's own)."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    return plt.subplots(*args, **({"layout": "constrained"} | kwargs))


def before_after(comparison) -> Figure:
    """Left: seconds, a dot per repeat. Right: the counter that is the mistake."""
    from helpers.compare import counter_name, counter_value, short_provenance

    counter = comparison.evidence[0].counter
    figure, (left, right) = subplots(1, 2, figsize=(9, 2.9), width_ratios=(3, 2))
    last = {side: comparison.values(side, counter)[-1] for side in ("naive", "fixed")}
    for y, side in ((1, "naive"), (0, "fixed")):
        seconds = comparison.seconds(side)
        _dots(left, seconds, y, COLORS[side])
        value = last[side]
        right.barh(y, value, color=COLORS[side], height=0.5)
        right.annotate(
            counter_value(counter, value),
            (value, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    for axes in (left, right):
        axes.set_yticks([1, 0], comparison.labels)
        axes.set_ylim(-0.6, 1.6)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
    right.margins(x=0.3)
    right.set_xlim(0, max(right.get_xlim()[1], 1))
    left.set_xlabel("seconds per run (dot: one run, bar: fastest, hollow: first run)")
    left.set_title(f"{comparison.id}: time")
    right.set_title(counter_name(counter))
    right.xaxis.set_major_formatter(lambda x, _: counter_value(counter, x))
    right.xaxis.set_major_locator(_few_ticks(all(float(v).is_integer() for v in last.values())))
    return Figure(figure, comparison.finding(), short_provenance(comparison.provenance))


def _few_ticks(whole: bool):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=3, integer=whole)


def _dots(axes, values, y, color):
    """One dot per value; the first, with nothing warm yet, is hollow; a bar marks the smallest."""
    axes.barh(y, min(values), color=color, alpha=0.25, height=0.5)
    for i, value in enumerate(values):
        hollow = i == 0 and len(values) > 1
        axes.plot(
            value, y, "o", ms=8, mfc="white" if hollow else color, mec=color, mew=1.8, clip_on=False
        )


def bars(
    labels, values, title: str, xlabel: str, finding: str, colors=None, provenance="", runs=None
):
    """Horizontal bars, first label on top. `runs`: the single runs of each bar, as circles."""
    figure, axes = subplots(figsize=(9, 0.9 + 0.5 * len(labels)))
    positions = range(len(labels) - 1, -1, -1)
    axes.barh(positions, values, color=colors or FIXED, height=0.6)
    for y, value, single in zip(positions, values, runs or [[]] * len(values), strict=True):
        axes.plot(single, [y] * len(single), "o", ms=6, mfc="white", mec="black")
        edge = max([value, *single])
        axes.annotate(
            short(value), (edge, y), xytext=(9, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(positions, labels)
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return Figure(figure, finding, provenance)


def ceiling(parts: dict, together: float, finding: str, provenance: str = "") -> Figure:
    """What each part could do alone, in images/s on a log scale, and the line for all together.

    `parts`: name -> images/s of each repeat.
    """
    figure, axes = subplots(figsize=(9, 1.2 + 0.6 * len(parts)))
    for y, rates in enumerate(reversed(parts.values())):
        axes.barh(y, max(rates), color=GREY, height=0.55)
        axes.plot(rates, [y] * len(rates), "o", ms=6, mfc="white", mec="black")
        axes.annotate(
            short(max(rates)),
            (max(rates), y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(together, color=NAIVE, lw=2, ls="--")
    axes.annotate(
        f"together: {short(together)}",
        (together, 1),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="center",
        color=NAIVE,
    )
    axes.set_yticks(range(len(parts)), list(reversed(parts)))
    axes.set_xscale("log")
    axes.set_xlim(left=min(1.0, together / 2))
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("images/s, each part alone with all cores (log scale; circle: each run)")
    return Figure(figure, finding, provenance)


def curve(x, series: dict, title, xlabel, ylabel, finding, provenance="", log_x=True):
    """Lines over x, each repeat as a dot. `series`: label -> list (per x) of lists of values."""
    figure, axes = subplots(figsize=(9, 3.4))
    markers = iter("osD^v")
    for (label, runs), color in zip(series.items(), (FIXED, NAIVE, OTHER, GREY), strict=False):
        marker = next(markers)
        axes.plot(x, [max(r) for r in runs], color=color, lw=2, label=label)
        for at, values in zip(x, runs, strict=True):
            axes.plot([at] * len(values), values, marker, color=color, ms=6, mfc="white", mew=1.5)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    if len(series) > 1:
        axes.legend(frameon=False)
    return Figure(figure, finding, provenance)


def heat_map(panels: dict, rows, columns, title, xlabel, ylabel, unit, finding, provenance=""):
    """A value for each pair of settings, written into its cell; the best cell has a frame.

    `panels`: heading of each panel -> list (per row) of lists (per column) of values. All panels
    share one color scale; its colors can be told apart with any color vision, and in gray.
    """
    top = max(max(row) for grid in panels.values() for row in grid)
    size = (1.6 + (1.1 + 0.75 * len(columns)) * len(panels), 1.5 + 0.6 * len(rows))
    figure, all_axes = subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, (heading, grid) in zip(all_axes[0], panels.items(), strict=True):
        shown = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        best = max((v, y, x) for y, row in enumerate(grid) for x, v in enumerate(row))
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                bold = "bold" if (y, x) == best[1:] else "normal"
                color = "white" if value < 0.55 * top else "black"
                axes.text(x, y, short(value), ha="center", va="center", color=color, weight=bold)
        frame = {"fill": False, "ec": NAIVE, "lw": 3}
        axes.add_patch(_rectangle((best[2] - 0.46, best[1] - 0.46), 0.92, 0.92, **frame))
        axes.set_xticks(range(len(columns)), [str(c) for c in columns])
        axes.set_yticks(range(len(rows)), [str(r) for r in rows])
        axes.grid(visible=False)
        axes.set_title(heading, fontsize=11, fontweight="normal")
        axes.set_xlabel(xlabel)
    all_axes[0][0].set_ylabel(ylabel)
    figure.colorbar(shown, ax=all_axes[0], label=unit)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return Figure(figure, finding, provenance)


def _rectangle(*args, **kwargs):
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)


def waterfall(steps, rates, megabytes_moved, finding: str, provenance: str = "") -> Figure:
    """A job that loses one mistake after the other: images/s of each step, and what it moves."""
    figure, (left, right) = subplots(
        1, 2, figsize=(9, 1.2 + 0.42 * len(steps)), width_ratios=(3, 2), sharey=True
    )
    positions = range(len(steps) - 1, -1, -1)
    colors = [NAIVE, *[GREY] * (len(steps) - 2), FIXED]
    left.barh(positions, rates, color=colors, height=0.6)
    for y, rate, before in zip(positions, rates, [None, *rates], strict=False):
        change = "" if before is None else f"  ({rate / before:.1f}x)"
        left.annotate(
            f"{short(rate)}{change}",
            (rate, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    right.barh(positions, megabytes_moved, color=colors, height=0.6)
    for y, value in zip(positions, megabytes_moved, strict=True):
        right.annotate(
            short(value), (value, y), xytext=(4, 0), textcoords="offset points", va="center"
        )
    left.set_yticks(positions, steps)
    left.set_xlabel("images/s, start-up included (change to the step before)")
    right.set_xlabel("MB through the object store")
    left.set_title("Step by step")
    for axes in (left, right):
        axes.margins(x=0.3)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
    return Figure(figure, finding, provenance)


def break_even(lines: dict, finding: str, provenance: str = "") -> Figure:
    """Time over number of images. `lines`: name -> (seconds to the first answers, images/s), four
    at most."""
    figure, axes = subplots(figsize=(9, 3.4))
    counts = [2**k for k in range(4, 15)]
    styles = ((FIXED, "o-"), (GREY, "s-"), (GREY, "D--"), (OTHER, "^-"))
    for i, (name, (start, rate)) in enumerate(lines.items()):
        color, style = styles[i]
        seconds = [start + count / rate for count in counts]
        axes.plot(counts, seconds, style, color=color, lw=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts[::2], [f"{count:,}" for count in counts[::2]])
    axes.set_xlabel("images")
    axes.set_ylabel("seconds, computed from start and rate")
    axes.set_title("From how many images on is it worth it?")
    axes.legend(frameon=False)
    return Figure(figure, finding, provenance)


def plan(operators, title: str = "plan") -> Figure:
    """The physical plan as boxes: what is fused stands in one box; between boxes, what is shipped.

    `operators`: names (from `measure.plan`), or the `measure.Operator`s of a run, which add tasks
    and bytes.
    """
    names = [op if isinstance(op, str) else op.name for op in operators]
    figure, axes = subplots(figsize=(9, 0.7 + 0.62 * len(names)))
    axes.axis("off")
    for i, (name, op) in enumerate(zip(names, operators, strict=True)):
        y = -i
        measured = not isinstance(op, str)
        color = NAIVE if measured and op.actors else FIXED
        box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": color, "lw": 2}
        axes.text(0, y, name.replace("->", " → "), ha="left", va="center", bbox=box)
        if measured:
            kind = "actors" if op.actors else "tasks"
            text = f"{op.tasks} tasks on {kind}" if op.actors else f"{op.tasks} {kind}"
            axes.text(
                0.66, y, f"{text}, {op.rows} rows, {megabytes(op.bytes_out)} out", va="center"
            )
        if i:
            axes.annotate(
                "", (0.05, y + 0.25), (0.05, y + 0.75), arrowprops={"arrowstyle": "->", "lw": 1.5}
            )
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.set_xlim(-0.02, 1.1)
    axes.set_title(title)
    parts = "; then ".join(name.replace("->", " fused with ") for name in names)
    return Figure(figure, f"{title}: {len(names)} operators: {parts}.")


def timeline(run, title: str = "One run over time") -> Figure:
    """Images done, CPU and object store over the seconds of one run."""
    figure, axes = subplots(3, 1, figsize=(9, 5.2), sharex=True)
    at = [s.at_s for s in run.samples]
    axes[0].plot(at, [s.rows for s in run.samples], color=FIXED, lw=2)
    axes[0].set_ylabel("images done")
    axes[1].plot(at, [s.cpu_percent for s in run.samples], color=GREY, lw=2, label="CPU")
    if run.gpu_percent is not None:
        axes[1].plot(
            at, [s.gpu_percent for s in run.samples], color=OTHER, lw=2, ls="--", label="GPU"
        )
        axes[1].legend(frameon=False)
    axes[1].set_ylabel("busy, %")
    axes[1].set_ylim(0, 105)
    axes[2].plot(at, [s.object_store_bytes / 1e6 for s in run.samples], color=NAIVE, lw=2)
    axes[2].set_ylabel("object store, MB")
    axes[2].set_xlabel("seconds")
    axes[0].set_title(title)
    if run.first_batch_s is not None:
        for ax in axes:
            ax.axvline(run.first_batch_s, color="black", lw=1, ls=":")
        axes[0].annotate(
            " first answers", (run.first_batch_s, 0.9), xycoords=("data", "axes fraction"), va="top"
        )
    first = f"{run.first_batch_s:.1f} s" if run.first_batch_s is not None else "unknown time"
    finding = (
        f"{run.rows} images in {run.seconds:.1f} s; the first answers came after {first}; "
        f"CPU {run.cpu_percent:.0f} % busy on average, object store at most "
        f"{megabytes(run.peak_object_store_bytes)}."
    )
    return Figure(figure, finding)


def images(paths, captions, finding: str, columns: int = 4) -> Figure:
    """Pictures in a grid, each with a caption below."""
    from PIL import Image

    rows = -(-len(paths) // columns)
    figure, axes = subplots(rows, columns, figsize=(9, 2.5 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, path, caption in zip(axes.flat, paths, captions, strict=False):
        with Image.open(path) as image:
            ax.imshow(image.convert("RGB"))
        ax.set_title(caption, fontsize=9, fontweight="normal", loc="center")
    return Figure(figure, finding)


class Table:
    """Rows of text, shown as a compact table; `code` between backticks, as in Markdown."""

    def __init__(self, header, rows, caption: str = ""):
        self.header, self.rows, self.caption = list(header), [list(row) for row in rows], caption

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return (
            f'<div class="course-table"><table>{caption}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def __repr__(self) -> str:
        return "\n".join(" | ".join(str(c) for c in row) for row in [self.header, *self.rows])


def _cell(cell) -> str:
    """A sentence keeps some width on a phone: in a narrow column it would make a tall row."""
    kind = ' class="sentence"' if len(str(cell)) > 40 else ""
    return f"<td{kind}>{_rich(cell)}</td>"


def _rich(cell) -> str:
    text = f"{cell:,}" if type(cell) is int else str(cell)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def comparison_table(comparison) -> str:
    """The checked claims of a comparison, then what was only observed, as HTML."""
    from helpers.compare import counter_name, counter_value

    rows = []
    for claim in comparison.evidence:
        naive, fixed = (comparison.values(s, claim.counter)[-1] for s in ("naive", "fixed"))
        rows.append(
            [
                f"✓ {counter_name(claim.counter)}",
                counter_value(claim.counter, naive),
                counter_value(claim.counter, fixed),
            ]
        )
    found = comparison.agreement
    if comparison.answers_expected == "rows":
        sides = (comparison.naive[-1], comparison.fixed[-1])
        rows.append(["✗ one row for each image", *(f"{run.rows} rows" for run in sides)])
    else:
        mark = "✓" if comparison.answers_expected == "same" else "✗"
        same = f"{found.same} of {found.images} images (within {found.tolerance:g})"
        rows.append([f"{mark} same answer", same, ""])
    observed = {
        "seconds": lambda r: r.seconds,
        "images/s, end to end": lambda r: r.images_per_s,
        "seconds to first answers": lambda r: r.first_batch_s,
        "images/s, after the first": lambda r: r.steady_images_per_s,
        "CPU busy, %": lambda r: r.cpu_percent,
        "GPU busy, %": lambda r: r.gpu_percent,
        "peak worker memory, MB": lambda r: r.peak_worker_bytes / 1e6,
        "peak object store, MB": lambda r: r.peak_object_store_bytes / 1e6,
    }
    for name, value in observed.items():
        cells = [
            _spread([value(run) for run in side]) for side in (comparison.naive, comparison.fixed)
        ]
        if any(cells):
            rows.append([name, *cells])
    return Table(["✓ checked on every run", *comparison.labels], rows)._repr_html_()


def _spread(values) -> str:
    """The middle of the repeats, and their range."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return ""
    middle = known[len(known) // 2]
    digits = 0 if middle >= 100 else 1
    if len(known) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({known[0]:,.{digits}f} to {known[-1]:,.{digits}f})"


def short(value: float) -> str:
    """A number for a label: three digits are enough."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def megabytes(n: float) -> str:
    if not n:
        return "0"
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def panel(kind: str, title: str, lines: list[str]) -> str:
    """A box of feedback as HTML. `kind`: ok, wrong, notfixed, suspicious or note."""
    items = "".join(f"<li>{_rich(line)}</li>" for line in lines)
    head = f"<strong>{html.escape(title)}</strong>"
    return f'<div class="course-panel {kind}">{head}<ul>{items}</ul></div>'


def show_status(text: str, handle=None):
    """Show or replace one line while a cell works; returns the handle. Silent outside notebooks."""
    if not _in_notebook():
        return None
    from IPython.display import HTML, display

    shown = HTML(f"<small>{html.escape(text)} …</small>")
    if handle is None:
        return display(shown, display_id=True)
    handle.update(shown)
    return handle


def clear_status(handle) -> None:
    if handle is not None:
        from IPython.display import HTML

        handle.update(HTML(""))


def _in_notebook() -> bool:
    import sys

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
