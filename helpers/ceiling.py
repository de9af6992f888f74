"""What this machine could do if nothing were lost: each part of the job alone, on all cores.

One process for each core, single-threaded, without Ray: no scheduling, no copies, no waiting. On a
CPU the parts share the cores, so their times add up; beside a GPU the slowest part sets the pace.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from helpers import model
from helpers.device import Settings, usable_cores

_IMAGES = 32  # for each process and repeat

_net = None  # in a worker: its model
_files: list[bytes] = []
_crops = None


def measure(paths: list[str], settings: Settings, repeats: int = 3) -> dict:
    """Images/s of `read`, `decode` and `model`, a list of repeats each, and the ceiling of the
    whole job, `together`. Takes some seconds of start-up and a few for each repeat."""
    cores = usable_cores()
    # From all over the list: its first images may be of one class, and larger than others.
    some = [paths[i * len(paths) // _IMAGES] for i in range(_IMAGES)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, _start, (some, settings)) as pool:
        rates = {
            "read": _rates(pool, _read, some, cores, repeats),
            "decode": _rates(pool, _decode, some, cores, repeats),
        }
        if settings.torch_device == "cpu":  # the faster of two sizes: a ceiling is no less
            sizes = (settings.batch_size, max(1, settings.batch_size // 2))
            rates["model"] = max(
                (_rates(pool, _infer, size, cores, repeats) for size in sizes), key=max
            )
    if settings.torch_device != "cpu":  # one process for each GPU; one GPU speaks for all
        with ProcessPoolExecutor(1, context, _start, (some, settings)) as pool:
            alone = _rates(pool, _infer, settings.batch_size, 1, repeats)
        rates["model"] = [rate * settings.actors for rate in alone]
    return rates | {"together": together(rates, settings)}


def together(rates: dict[str, list[float]], settings: Settings) -> float:
    """Images/s of the whole job from the best repeat of each part."""
    best = [max(rates[part]) for part in ("read", "decode", "model")]
    if settings.torch_device == "cpu":
        return 1 / sum(1 / rate for rate in best)
    return min(best)


def _rates(pool, work, argument, processes: int, repeats: int) -> list[float]:
    """One warm-up, then images/s of all processes together, for each repeat."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        list(pool.map(work, [argument] * processes))
        found.append(processes * _IMAGES / (time.perf_counter() - start))
    return found[1:]


# --- in the processes --------------------------------------------------------------------------


def _start(paths: list[str], settings: Settings) -> None:
    global _net, _files, _crops
    import torch

    model.tune_memory()
    torch.set_num_threads(settings.threads)
    _files = [Path(path).read_bytes() for path in paths]
    _crops = np.stack([model.preprocess(file) for file in _files])
    net = model.resnet50(settings.precision, settings.channels_last, fold_batch_norm=True)
    _net = net.to(settings.torch_device)


def _read(paths: list[str]) -> None:
    for path in paths:
        Path(path).read_bytes()


def _decode(_) -> None:
    for file in _files:
        model.preprocess(file)


def _infer(batch_size: int) -> None:
    for at in range(0, _IMAGES, batch_size):
        model.predict(_net, _crops[at : at + batch_size])
