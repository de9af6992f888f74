"""`python -m helpers compare`: baseline against optimized pipeline, with peers and a report.

Each pipeline and each peer runs in a process of its own, one after the other, so that every one of
them pays for its own start-up and none sees what another left behind.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import commands, plots

_REFERENCE_IMAGES = 64  # how many answers are held against torchvision's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=commands._positive,
        help="how many images (default: COURSE_IMAGES, else 64); 512 or more for a fair rate",
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("report"),
        help="folder for index.html, report.md and the figures (default: %(default)s)",
    )
    parser.add_argument(
        "--without-baseline", action="store_true", help="skip the slow side, and what needs it"
    )


def main(options: argparse.Namespace) -> int:
    from helpers.data import DataError
    from helpers.model import ModelError

    try:
        found = measure(options.images, baseline=not options.without_baseline)
    except (DataError, ModelError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    commands._write_json(options.json, found)
    write(found, options.report)
    print(f"\n{as_text(found)}\n\nReport: {(options.report / 'index.html').resolve().as_uri()}")
    return 0


# --- measuring -----------------------------------------------------------------------------------


def measure(images: int | None = None, baseline: bool = True) -> dict:
    """Run everything once. The keys are described in `python -m helpers compare --help`.

    Raises: DataError, ModelError; RuntimeError when a part fails, with its last lines.
    """
    from helpers import ceiling, compare, data, device, model, peers

    source = data.images(images)
    model.weights()
    settings = device.recommend(device.detect())
    found: dict = {"version": 1, "images": source.to_dict()}
    names = ["baseline", "optimized"] if baseline else ["optimized"]
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found[name], answers[name] = _own_process(name, len(source), Path(folder))
    for name in peers.NAMES:
        _say(f"{name}: a loop without Ray" if name == "dataloader" else name)
        found[name] = peers.run(name, source.paths, settings)
        if found[name]:
            answers[name] = _by_image(found[name].pop("answers"))
    _say("ceiling: each part alone")
    found["ceiling"] = ceiling.measure(source.paths, settings)
    _say("reference: torchvision's own transforms, float32")
    some = source.paths[:_REFERENCE_IMAGES]
    reference = _by_image(model.reference_logits(some))
    found["agreement"] = {
        name: _agreement(answers[name], answers["optimized"], settings.tolerance)
        for name in answers
        if name != "optimized"
    }
    of_those = {name: answers["optimized"][name] for name in reference}
    found["agreement"]["reference"] = _agreement(reference, of_those, settings.tolerance)
    found["ratios"] = ratios(found)
    found["provenance"] = compare.provenance(source)
    return found


def _own_process(name: str, images: int, folder: Path) -> tuple[dict, dict]:
    """Run `python -m helpers <name>`; its numbers and its answers."""
    from helpers import measure as measuring

    _say(name)
    numbers, output = folder / f"{name}.json", folder / name
    command = [sys.executable, "-m", "helpers", name, "--images", str(images)]
    start = time.time()
    done = subprocess.run(
        [*command, "--output", str(output), "--json", str(numbers)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        raise RuntimeError(f"python -m helpers {name} failed; its own message stands above.")
    found = json.loads(numbers.read_text())
    start_up = found.pop("ray_ready_at") - start
    found.pop("provenance")
    found["ray_ready_s"] = start_up
    found["end_to_end_s"] = start_up + found["seconds"]
    found["end_to_end_images_per_s"] = found["images"] / found["end_to_end_s"]
    return found, measuring.read_answers(output)[0]


def ratios(found: dict) -> dict:
    """The numbers that the course's targets are about."""
    optimized, loop = found["optimized"], found["dataloader"]
    here = {
        "steady_vs_ceiling": _ratio(optimized["steady_images_per_s"], found["ceiling"]["together"]),
        "steady_vs_dataloader": _ratio(
            optimized["steady_images_per_s"], loop["steady_images_per_s"]
        ),
        "end_to_end_vs_dataloader": _ratio(
            optimized["end_to_end_images_per_s"], loop["images_per_s"]
        ),
        "first_answers_s": optimized["first_answers_s"],
    }
    if "baseline" in found:
        baseline = found["baseline"]
        here["images_per_s"] = _ratio(optimized["images_per_s"], baseline["images_per_s"])
        peak = _ratio(optimized["object_store_peak_bytes"], baseline["object_store_peak_bytes"])
        here["object_store_saved"] = None if peak is None else 1 - peak
    return here


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _agreement(a: dict, b: dict, tolerance: float) -> dict:
    """How the answers `b` compare with `a`.

    Rounding may turn the order of two classes that are nearly equal. So the first class is also
    compared among the `clear` images alone: those where it leads in `a` by more than the tolerance.
    """
    import numpy as np

    from helpers import compare

    found = compare.agree(a, b, tolerance)
    best = {name: np.sort(logits)[-2:] for name, logits in a.items() if name in b}
    clear = [name for name, (second, first) in best.items() if first - second > tolerance]
    return {
        "clear": len(clear),
        "clear_top1_same": sum(int(np.argmax(a[n]) == np.argmax(b[n])) for n in clear),
        "images": found.images,
        "same": found.same,
        "tolerance": found.tolerance,
        "largest_difference": found.largest_difference,
        "top1_same": found.top1_same,
        "differing": found.differing,
    }


def _by_image(answers: dict) -> dict:
    from helpers import measure as measuring

    return {measuring.short_key(path): logits for path, logits in answers.items()}


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


# --- the report ----------------------------------------------------------------------------------

_ROWS = {
    "images/s, after Ray is ready": lambda s: _number(s.get("images_per_s")),
    "images/s, with all start-up": lambda s: _number(
        s.get("end_to_end_images_per_s", s.get("images_per_s"))
    ),
    "images/s, after the first answers": lambda s: _number(s.get("steady_images_per_s")),
    "seconds, with all start-up": lambda s: _number(s.get("end_to_end_s", s.get("seconds"))),
    "seconds from Ray ready to first answers": lambda s: (
        _number(s.get("first_answers_s")) if "ray_ready_s" in s else "no Ray"
    ),
    "peak object store": lambda s: _bytes(s.get("object_store_peak_bytes")),
    "spilled": lambda s: _bytes(s.get("spilled_bytes")),
    "peak memory of the workers": lambda s: _bytes(s.get("worker_peak_bytes")),
    "CPU busy, %": lambda s: _number(s.get("cpu_percent")),
    "CPU seconds: actors, tasks, driver, Ray": lambda s: _cpu_seconds(s.get("cpu_seconds")),
    "GPU busy, %": lambda s: _number(s.get("gpu_percent")),
    "bytes read by the workers": lambda s: _bytes(s.get("bytes_read")),
    "bytes written by the workers": lambda s: _bytes(s.get("bytes_written")),
    "files written": lambda s: _number(s.get("files_written")),
    "model constructions": lambda s: _number(s.get("model_constructions")),
    "executions": lambda s: _number(s.get("executions")),
}


def sides(found: dict) -> dict[str, dict]:
    names = {"baseline": "baseline", "optimized": "optimized"}
    names |= {"dataloader": "DataLoader loop", "daft": "Daft"}
    return {title: found[name] for name, title in names.items() if found.get(name)}


def table(found: dict) -> list[list[str]]:
    """A header, then a row for each measure; measures that nobody has are left out."""
    shown = sides(found)
    rows = [[name, *(cell(side) for side in shown.values())] for name, cell in _ROWS.items()]
    return [["", *shown], *(row for row in rows if any(row[1:]))]


def verdicts(found: dict) -> list[str]:
    """The ratios in words."""
    r, lines = found["ratios"], []
    if r.get("images_per_s") is not None:
        lines.append(
            f"The optimized pipeline does {r['images_per_s']:.1f}x the baseline's images/s."
        )
    if r.get("object_store_saved") is not None:
        lines.append(
            f"Its peak in the object store is {100 * r['object_store_saved']:.0f} % lower."
        )
    for key, text in {
        "steady_vs_ceiling": "of this machine's ceiling, after the first answers",
        "steady_vs_dataloader": "of a plain DataLoader loop, after the first answers",
        "end_to_end_vs_dataloader": "of a plain DataLoader loop, with all start-up",
    }.items():
        if r[key] is not None:
            lines.append(f"It reaches {100 * r[key]:.0f} % {text}.")
    if r["first_answers_s"] is not None:
        lines.append(f"Its first answers come {r['first_answers_s']:.1f} s after Ray is ready.")
    for name, agreement in found["agreement"].items():
        lines.append(
            f"Its answers agree with {name} for {agreement['same']} of {agreement['images']} "
            f"images (logits within {agreement['tolerance']:g}; largest difference "
            f"{agreement['largest_difference']:.2g}). The first class leads by more than "
            f"{agreement['tolerance']:g} in {agreement['clear']}; it is the same in "
            f"{agreement['clear_top1_same']} of them."
        )
    if not found.get("daft"):
        lines.append("Daft is not installed here (pip install -r requirements-peers.txt).")
    return lines


def as_text(found: dict) -> str:
    rows = table(found)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *verdicts(found)])


def figures(found: dict) -> dict[str, plots.Figure]:
    """The report's figures by file name."""
    from helpers.compare import short_provenance

    where = short_provenance(found["provenance"])
    shown = sides(found)
    colors = {"baseline": plots.NAIVE, "optimized": plots.FIXED}
    rate = {name: s.get("end_to_end_images_per_s", s["images_per_s"]) for name, s in shown.items()}
    steady = {name: s["steady_images_per_s"] for name, s in shown.items()}
    steady = {name: value for name, value in steady.items() if value}
    steady["ceiling"] = found["ceiling"]["together"]

    def bars(title: str, unit: str, what: str, values: dict[str, float]) -> plots.Figure:
        return plots.bars(
            list(values),
            list(values.values()),
            title=title,
            xlabel=unit,
            finding=_listed(what, values),
            colors=[colors.get(name, plots.GREY) for name in values],
            provenance=where,
        )

    what = "Images per second"
    drawn = {
        "end_to_end": bars("With all start-up", "images/s", f"{what} with all start-up", rate),
        "steady": bars(
            "After the first answers", "images/s", f"{what} after the first answers", steady
        ),
    }
    if "baseline" in found:
        peak = {
            name: found[name]["object_store_peak_bytes"] / 1e6 for name in ("baseline", "optimized")
        }
        what = "Peak in the object store, MB"
        drawn["object_store"] = bars("Peak in the object store", "MB", what, peak)
    return drawn


def write(found: dict, folder: Path) -> None:
    """index.html (one file, no network), report.md and its figures."""
    from helpers.compare import short_provenance

    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures(found)
    for name, figure in drawn.items():
        (folder / f"{name}.png").write_bytes(figure.png)
    rows, lines = table(found), verdicts(found)
    title = f"{found['images']['count']} images, baseline and optimized"
    where = short_provenance(found["provenance"])
    markdown = [f"# {title}", "", *(f"- {line}" for line in lines), ""]
    markdown += ["| " + " | ".join(row) + " |" for row in rows[:1]]
    markdown += ["|" + "---|" * len(rows[0])]
    markdown += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    markdown += ["", *(f"![{figure.finding}]({name}.png)\n" for name, figure in drawn.items())]
    (folder / "report.md").write_text("\n".join([*markdown, where, ""]), encoding="utf-8")
    body = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><main>'
        f"<h1>{html.escape(title)}</h1><ul>{body}</ul>"
        f"{plots.Table(rows[0], rows[1:])._repr_html_()}"
        f"{''.join(figure._repr_html_() for figure in drawn.values())}"
        f"<p><small>{html.escape(where)}</small></p></main></html>"
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


_STYLE = """
:root { color-scheme: light dark }
main { max-width: 60rem; margin: auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif }
table { border-collapse: collapse } .course-table { overflow-x: auto }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8888; text-align: left }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; background: #fff; border-radius: 8px }
"""


def _listed(what: str, values: dict[str, float]) -> str:
    return f"{what}: " + ", ".join(f"{k} {plots.short(v)}" for k, v in values.items()) + "."


def _number(value: float | None) -> str:
    return "" if value is None else plots.short(float(value))


def _cpu_seconds(value: dict[str, float] | None) -> str:
    roles = ("actors", "tasks", "driver", "ray")
    return ", ".join(plots.short(value[role]) for role in roles) if value else ""


def _bytes(value: float | None) -> str:
    return "" if value is None else plots.megabytes(value) if value else "0"
