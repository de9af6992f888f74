"""Count things where they happen, in any process of the cluster, and add them up in the driver.

A pipeline runs in many worker processes, so "how often was the model built?" has no variable to
look at. Each process appends one short line per event to a file of its own, a few microseconds
each. The file survives the process, also when Ray ends an actor abruptly.
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

_ROOT = Path(tempfile.gettempdir()) / f"ray-data-course-{getattr(os, 'getuid', lambda: 0)()}"
_ENV = "COURSE_EVENTS"
_open_files: dict[tuple[int, Path], int] = {}


def emit(name: str, n: int = 1) -> None:
    """Count `n` more of `name`. Safe to call from any process; never raises for a full disk."""
    folder = _folder()
    key = (os.getpid(), folder)
    if key not in _open_files:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        _open_files[key] = os.open(folder / f"{os.getpid()}.tsv", flags, 0o600)
    with contextlib.suppress(OSError):  # a measurement must never break what it observes
        os.write(_open_files[key], f"{name}\t{n}\n".encode())


def counted(function):
    """Decorate a function so that each call counts as `calls:<its name>`."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        emit(f"calls:{function.__name__}")
        return function(*args, **kwargs)

    return wrapper


def totals() -> Counter:
    """Everything counted so far in this session, on all nodes: `{name: count}`.

    The counts only grow; a run's own counts are the difference of two calls.
    """
    folders = _folders()
    ray = sys.modules.get("ray")
    nodes = ray.nodes() if ray is not None and ray.is_initialized() else []
    alive = [node["NodeID"] for node in nodes if node["Alive"]]
    if len(alive) <= 1:
        return sum((_read(folder) for folder in folders), Counter())
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    read = ray.remote(num_cpus=0)(lambda: sum((_read(folder) for folder in folders), Counter()))
    tasks = [read.options(scheduling_strategy=OnNode(node, soft=False)).remote() for node in alive]
    return sum(ray.get(tasks), Counter())


def _read(folder: Path) -> Counter:
    counts: Counter = Counter()
    for file in folder.glob("*.tsv"):
        for line in file.read_text().splitlines():
            name, _, n = line.partition("\t")
            if n.isdigit():  # the last line of a killed process may be cut
                counts[name] += int(n)
    return counts


def _folder() -> Path:
    """One folder per Ray job, found in the same way by the driver and by each worker."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        return _ROOT / f"{context.get_session_name()}-{context.get_job_id()}"
    if _ENV not in os.environ:  # no cluster: child processes inherit the variable
        os.environ[_ENV] = str(_ROOT / f"local-{os.getpid()}-{time.time_ns()}")
    return Path(os.environ[_ENV])


def _folders() -> list[Path]:
    """This node's folders. (Counts from before `ray.init` stay in the folder without a cluster.)"""
    folders = {_folder()}
    if _ENV in os.environ:
        folders.add(Path(os.environ[_ENV]))
    return sorted(folders)


def remove_old(days: float = 1.0) -> None:
    """Delete the event files of sessions that ended long ago."""
    for folder in _ROOT.glob("*"):
        if folder.stat().st_mtime < time.time() - days * 86400:
            shutil.rmtree(folder, ignore_errors=True)
