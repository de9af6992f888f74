"""The commands that run a pipeline or a part of it: data, ceiling, baseline, optimized."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.prog.split()[-1]
    parser.add_argument(
        "--images", type=_positive, help="how many images (default: COURSE_IMAGES, else 64)"
    )
    if command in ("baseline", "optimized"):
        where = "a folder" if command == "baseline" else "a folder, local or s3://..."
        parser.add_argument(
            "--input", help=f"{where}, with images (default: the course's own images)"
        )
        parser.add_argument(
            "--output", default=f"answers-{command}", help=f"{where} (default: %(default)s)"
        )
    if command == "ceiling":
        parser.add_argument("--repeats", type=_positive, default=3, help="default: %(default)s")
    if command != "data":
        parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.set_defaults(run=_COMMANDS[command])


def main(options: argparse.Namespace) -> int:
    from helpers.data import DataError
    from helpers.model import ModelError

    try:
        return options.run(options)
    except (DataError, ModelError) as error:
        print(error, file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _data(options) -> int:
    from helpers import data

    source = data.images(options.images)
    print(f"They are in {source.root}")
    return 0


def _ceiling(options) -> int:
    from helpers import ceiling, compare, data, device, model

    source = data.images(options.images)
    model.weights()
    settings = device.recommend()
    found = ceiling.measure(source.paths, settings, options.repeats)
    for part in ("read", "decode", "model"):
        low, high = min(found[part]), max(found[part])
        print(f"{part:>8}: {high:10,.1f} images/s (best of {options.repeats}, {low:,.1f} at least)")
    print(f"together: {found['together']:10,.1f} images/s")
    _write_json(options.json, found | {"provenance": compare.provenance(source)})
    return 0


def _baseline(options) -> int:
    from helpers import baseline

    def pipeline(source, settings):
        return baseline.run(source, options.output, options.images)

    return _observed(options, pipeline)


def _optimized(options) -> int:
    from helpers import optimized

    def pipeline(source, settings):
        done = optimized.run(source, options.output, settings, options.images)
        if done["done"]:
            print(f"{done['done']} of {done['found']} images were done before.", flush=True)
        return done["classified"]

    try:
        return _observed(options, pipeline)
    except optimized.OutputError as error:
        print(error, file=sys.stderr)
        return 2


_COMMANDS = {
    "data": _data,
    "ceiling": _ceiling,
    "baseline": _baseline,
    "optimized": _optimized,
}


# --- one run, watched ----------------------------------------------------------------------------


def _observed(options, pipeline) -> int:
    from helpers import checkpoint, compare, data, device, measure

    source = options.input or data.images(options.images)
    paths = options.input or source.paths
    checkpoint.decide()
    device.start_ray()
    ready = time.time()
    settings = device.recommend()

    remote = "://" in options.output  # not read back
    classified = 0

    def write():
        nonlocal classified
        classified = pipeline(paths, settings)
        return {"path": [], "logits": []} if remote else Path(options.output)

    with _Progress(len(source) if not options.input else options.images) as progress:
        run = measure.run(write, options.command, on_sample=progress)
    print(
        f"{classified} images classified in {run.seconds:.1f} s; the answers are in "
        f"{options.output.partition('?')[0]}",
        flush=True,
    )
    numbers = side(run) | {"ray_ready_at": ready, "settings": settings.to_dict()}
    # Of this run, whatever else is in the output already.
    numbers |= {"images": classified, "images_per_s": classified / run.seconds}
    provenance = compare.provenance(None if options.input else source)
    _write_json(options.json, numbers | {"provenance": provenance})
    return 0


def side(run) -> dict:
    """What `compare` reports of one pipeline. The keys are part of the interface."""
    return {
        "images": len(run.answers),
        "rows": run.rows,
        "seconds": run.seconds,
        "images_per_s": run.images_per_s,
        "first_answers_s": run.first_batch_s,
        "steady_images_per_s": run.steady_images_per_s,
        "object_store_peak_bytes": run.peak_object_store_bytes,
        "spilled_bytes": run.spilled_bytes,
        "worker_peak_bytes": run.peak_worker_bytes,
        "cpu_percent": run.cpu_percent,
        "cpu_seconds": run.cpu_s,
        "gpu_percent": run.gpu_percent,
        "bytes_read": run.bytes_read,
        "bytes_written": run.bytes_written,
        "files_written": len(run.files_written),
        "file_bytes": sum(run.files_written),
        "model_constructions": run.counter("model_constructions"),
        "executions": run.counter("executions"),
        "tasks": run.counter("tasks"),
        "bytes_through_store": run.counter("bytes_through_store"),
        "images_through_model": run.counter("images_through_model"),
        "stages": [
            {"name": op.name, "seconds": op.task_s, "bytes_out": op.bytes_out, "tasks": op.tasks}
            for op in run.operators
        ],
    }


class _Progress:
    """A line now and then while a pipeline runs; on a terminal the line replaces itself."""

    def __init__(self, images: int | None):
        self._images = images
        self._every_s = 1 if sys.stderr.isatty() else 10
        self._last = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def __call__(self, sample) -> None:
        if sample.at_s - self._last < self._every_s:
            return
        self._last = sample.at_s
        of = f" of {self._images}" if self._images else ""
        line = (
            f"{sample.at_s:5.0f} s: {sample.rows}{of} images through the stage before the output, "
            f"CPU {sample.cpu_percent:.0f} %, object store {sample.object_store_bytes / 1e6:.0f} MB"
        )
        end = "\r" if sys.stderr.isatty() else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


def _write_json(file: Path | None, content: dict) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, suffix=".part") as part:
        json.dump(content, part, indent=1, default=float)
    Path(part.name).replace(file)
