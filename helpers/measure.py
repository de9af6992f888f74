"""Run one pipeline under observation and say what it did: counters, operators, samples, answers.

Counters are what the course asserts: they are the same on a busy machine as on an idle one. Times
and samples are shown with their spread and never asserted.
"""

import contextlib
import gc
import io
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from helpers import events

_SAMPLE_EVERY_S = 0.25


@dataclass
class Operator:
    """One physical operator of one execution, as Ray Data's executor counted it."""

    name: str
    tasks: int
    blocks: int  # blocks that left the operator
    rows: int  # rows that left the operator
    bytes_out: int  # bytes of those blocks: what went through the object store
    actors: bool  # an actor pool, not tasks
    task_s: float  # from a task's start to its end as the driver saw it, summed
    cpu_s: float = 0.0  # CPU time of the workers: reading, functions, making blocks; no start-up
    replicas: int = 0  # of an actor pool: the least that was asked for

    @property
    def is_input(self) -> bool:
        return self.name in ("Input", "InputDataBuffer")


@dataclass
class Sample:
    """The machine at one moment of a run."""

    at_s: float
    cpu_percent: float  # all cores of the machine: 0-100
    workers_bytes: int  # private memory of all Ray workers of this node
    largest_worker_bytes: int
    object_store_bytes: int  # more than before the run
    rows: int  # rows that have left the last operator (not counting a write) of the run under way
    gpu_percent: float | None = None
    gpu_bytes: int | None = None
    cpu_s: dict[str, float] = field(default_factory=dict)  # since the start of the run, by `ROLES`


# Whose CPU seconds a sample counts: of this process, of the actors in pools of Ray Data and of the
# workers for tasks, their start-up included, and of Ray's other processes on this node.
ROLES = ("driver", "actors", "tasks", "ray")


@dataclass
class Run:
    """What one observed run did. `answers` maps "synset/file" to that image's answer."""

    name: str
    seconds: float
    first_batch_s: float | None  # None: the pipeline returned a table, so nobody saw
    first_batch_rows: int
    answers: dict[str, np.ndarray]
    rows: int
    executions: list[list[Operator]]
    events: Counter
    samples: list[Sample]
    sampling_cost: float  # CPU seconds of the sampler per second of the run
    spilled_bytes: int
    bytes_read: int | None  # by the workers, through read calls; None: not known on this system
    bytes_written: int | None
    files_written: list[int] = field(default_factory=list)  # sizes in bytes
    extra: dict = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        """End to end, start-up included; from the images that came out, not from Ray's rows."""
        return len(self.answers) / self.seconds

    @property
    def steady_images_per_s(self) -> float | None:
        """After the first batch of answers, so without start-up. None when they came so late that
        the rest, in under an eighth of the time, was ready by then and waited to be handed over."""
        if self.first_batch_s is None or self.rows <= self.first_batch_rows:
            return None
        rest = self.seconds - self.first_batch_s
        return (self.rows - self.first_batch_rows) / rest if rest >= self.seconds / 8 else None

    @property
    def operators(self) -> list[Operator]:
        """The operators of all executions, without the input buffers."""
        return [op for execution in self.executions for op in execution if not op.is_input]

    def _pairs(self) -> list[tuple[Operator, Operator]]:
        """Neighboring operators of each execution."""
        return [pair for execution in self.executions for pair in pairwise(execution)]

    @property
    def batch_sizes(self) -> dict[int, int]:
        """Histogram of what the model saw: batch size -> forward passes."""
        found = {
            int(name.split(":")[1]): n
            for name, n in self.events.items()
            if name.startswith("batch_size:")
        }
        return dict(sorted(found.items()))

    @property
    def counters(self) -> dict[str, int | float]:
        """Every counter by name.

        "Model" in `bytes_to_model` and `bytes_from_model` is any actor pool: what the operator
        before it, and it itself, put into the object store.
        """
        ops = self.operators
        sizes = self.batch_sizes
        named = {
            "rows": self.rows,
            "duplicate_rows": self.rows - len(self.answers),
            "executions": len(self.executions),
            "operators": len(ops),
            "actor_operators": sum(op.actors for op in ops),
            "replicas_asked": sum(op.replicas for op in ops),
            "tasks": sum(op.tasks for op in ops),
            "blocks": sum(op.blocks for op in ops),
            "bytes_through_store": sum(op.bytes_out for op in ops),
            "bytes_to_model": sum(before.bytes_out for before, op in self._pairs() if op.actors),
            "bytes_from_model": sum(op.bytes_out for op in ops if op.actors),
            "model_constructions": 0,
            "forward_passes": 0,
            "images_through_model": 0,
            "forward_passes_with_autograd": 0,
            "forward_passes_channels_last": 0,
            "largest_batch": max(sizes, default=0),
            "smallest_batch": min(sizes, default=0),
            "spilled_bytes": self.spilled_bytes,
            "files_written": len(self.files_written),
        }
        return named | dict(self.events) | self.extra

    def counter(self, name: str) -> int | float:
        """One counter of `counters`, or one that is summed over some operators.

        `bytes_out:X`, `rows_out:X`, `tasks:X`, `blocks:X` and `operators:X` sum over the operators
        whose name contains X; zero when no operator does.

        Raises: KeyError with the names there are.
        """
        kind, _, text = name.partition(":")
        value = {
            "bytes_out": lambda op: op.bytes_out,
            "rows_out": lambda op: op.rows,
            "tasks": lambda op: op.tasks,
            "blocks": lambda op: op.blocks,
            "operators": lambda op: 1,
        }.get(kind)
        if text and value:
            return sum(value(op) for op in self.operators if text in op.name)
        if kind in ("calls", "batch_size"):
            return self.events.get(name, 0)
        try:
            return self.counters[name]
        except KeyError:
            raise KeyError(f"no counter {name!r}; there are {sorted(self.counters)}") from None

    @property
    def peak_object_store_bytes(self) -> int:
        return max((s.object_store_bytes for s in self.samples), default=0)

    @property
    def peak_worker_bytes(self) -> int:
        """Largest private memory of all workers together."""
        return max((s.workers_bytes for s in self.samples), default=0)

    @property
    def peak_largest_worker_bytes(self) -> int:
        return max((s.largest_worker_bytes for s in self.samples), default=0)

    @property
    def cpu_percent(self) -> float:
        return float(np.mean([s.cpu_percent for s in self.samples])) if self.samples else 0.0

    @property
    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by `ROLES`, up to the last sample."""
        return self.samples[-1].cpu_s if self.samples else {}

    @property
    def gpu_percent(self) -> float | None:
        seen = [s.gpu_percent for s in self.samples if s.gpu_percent is not None]
        return float(np.mean(seen)) if seen else None

    def to_dict(self) -> dict:
        """Everything but the answers, for JSON."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "first_batch_s": self.first_batch_s,
            "images": len(self.answers),
            "images_per_s": self.images_per_s,
            "steady_images_per_s": self.steady_images_per_s,
            "counters": self.counters,
            "batch_sizes": self.batch_sizes,
            "operators": [
                [vars(op) for op in execution if not op.is_input] for execution in self.executions
            ],
            "peak_object_store_bytes": self.peak_object_store_bytes,
            "peak_worker_bytes": self.peak_worker_bytes,
            "cpu_percent": self.cpu_percent,
            "gpu_percent": self.gpu_percent,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "sampling_cost": self.sampling_cost,
        }


def run(
    pipeline: Callable[[], object],
    name: str = "",
    answer: str = "logits",
    key: str = "path",
    on_sample: Callable[[Sample], None] | None = None,
) -> Run:
    """Call `pipeline`, consume what it returns and report.

    Args:
        pipeline: a function without arguments that returns one of
            a `ray.data.Dataset`: it is streamed to its end, the clock runs meanwhile;
            a folder (`Path`) that it wrote as Parquet: read back after the clock has stopped, with
            the first answers timed in the execution that wrote, to within a sample;
            a table (`pyarrow.Table`, `pandas.DataFrame`, list of rows, dict of columns).
        answer: the column that holds each image's answer, any array or number.
        key: the column that holds each image's path.
        on_sample: called with every `Sample` while the pipeline runs, for a live display.

    Raises: TypeError for another return value; KeyError for a missing column; whatever the pipeline
    raises.
    """
    settle()
    before = events.totals()
    with _Observer(on_sample) as seen:
        result = pipeline()
        seen.watch(result)
        answers, rows, first_batch_s, first_rows = _consume(result, answer, key, seen.elapsed)
    if isinstance(result, str | os.PathLike):
        files = parquet_files(result)
        answers, rows = read_answers(result, answer, key)
        first_batch_s, first_rows = _first_answers(seen.samples)
    else:
        files = []
    return Run(
        name=name,
        seconds=seen.seconds,
        first_batch_s=first_batch_s,
        first_batch_rows=first_rows,
        answers=answers,
        rows=rows,
        executions=seen.executions,
        events=events.totals() - before,
        samples=seen.samples,
        sampling_cost=seen.sampling_cost,
        spilled_bytes=seen.spilled_bytes,
        bytes_read=seen.bytes_read,
        bytes_written=seen.bytes_written,
        files_written=[f.stat().st_size for f in files],
    )


def settle(seconds: float = 2) -> None:
    """Wait until the runs before have let go of their CPUs, for some seconds at most.

    A run that was stopped early can leave an actor with its CPUs behind until Python collects
    garbage; the next run may then wait forever for a CPU. Lesson 04 shows it (R4). Blocks that
    an earlier Dataset held go, too.
    """
    import ray

    gc.collect()
    if not ray.is_initialized():
        return
    total, end = ray.cluster_resources().get("CPU", 0), time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < total and time.monotonic() < end:
        time.sleep(0.1)
        gc.collect()


def plan(dataset) -> list[str]:
    """The names of the physical operators that `dataset` would run, first to last, input left out.

    It is what `dataset.explain()` prints below "Physical Plan", read from that text.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        dataset.explain()
    physical = re.split(r"-+ (?:Optimized )?Physical Plan(?: \(Optimized\))? -+", text.getvalue())
    # Not each of them is called an operator: a sort is a SortShuffleMapOp and a ShuffleReduceOp.
    lines = re.findall(r"^\W*(\w+)\[([^\n]*)\]", physical[-1], flags=re.MULTILINE)
    return [name for kind, name in reversed(lines) if kind != "InputDataBuffer"]


def short_key(path: object) -> str:
    """The name by which answers are matched: "synset/file" of an image's path."""
    text = path.decode() if isinstance(path, bytes) else str(path)
    return "/".join(text.replace("\\", "/").split("/")[-2:])


def parquet_files(folder: str | os.PathLike) -> list[Path]:
    """All Parquet files of a local folder and below it."""
    return sorted(f for f in Path(folder).rglob("*.parquet") if f.is_file())


def read_answers(folder: str | os.PathLike, answer: str = "logits", key: str = "path"):
    """The answers in a folder's Parquet files, `{"synset/file": answer}`, and how many rows."""
    import pyarrow.dataset

    files = [str(file) for file in parquet_files(folder)]
    if not files:
        return {}, 0
    table = pyarrow.dataset.dataset(files).to_table(columns=[key, answer])
    return _answers(_columns(table), answer, key), table.num_rows


def _consume(result, answer, key, elapsed):
    """Answers, rows, seconds to the first batch and its rows, of what a pipeline returned."""
    import ray.data

    if isinstance(result, ray.data.Dataset):
        answers, rows, first_s, first_rows = {}, 0, None, 0
        for batch in result.iter_batches(batch_size=None, batch_format="numpy"):
            size = len(next(iter(batch.values()))) if batch else 0
            if first_s is None and size:
                first_s, first_rows = elapsed(), size
            rows += size
            answers.update(_answers(batch, answer, key))
        return answers, rows, first_s, first_rows
    if isinstance(result, str | os.PathLike):
        return {}, 0, None, 0
    columns = _columns(result)
    return _answers(columns, answer, key), len(columns[key]), None, 0


def _first_answers(samples: list[Sample]) -> tuple[float | None, int]:
    """When the first rows of the last execution came, to within a sample, and how many."""
    drops = [i for i, (a, b) in enumerate(pairwise(samples), 1) if b.rows < a.rows]
    last = samples[drops[-1] if drops else 0 :]
    return next(((s.at_s, s.rows) for s in last if s.rows), (None, 0))


def _columns(table) -> dict:
    import pandas as pd
    import pyarrow as pa

    if isinstance(table, pa.Table):
        return {c: table[c].to_pylist() for c in table.column_names}
    if isinstance(table, pd.DataFrame):
        return {c: table[c].tolist() for c in table.columns}
    if isinstance(table, list) and table and isinstance(table[0], dict):
        return {c: [row[c] for row in table] for c in table[0]}
    if isinstance(table, dict):
        return table
    raise TypeError(
        "the pipeline must return a Dataset, the folder that it wrote, or a table of answers; "
        f"it returned {type(table).__name__}"
    )


def _answers(columns: dict, answer: str, key: str) -> dict[str, np.ndarray]:
    for column in (key, answer):
        if column not in columns:
            raise KeyError(f"no column {column!r} in the result; it has {sorted(columns)}")
    pairs = zip(columns[key], columns[answer], strict=True)
    return {short_key(path): np.asarray(value) for path, value in pairs}


class _Observer:
    """Watches the executions of this driver and the workers of this node, until it is closed."""

    def __init__(self, on_sample=None):
        self.samples: list[Sample] = []
        self.executions: list[list[Operator]] = []
        self._on_sample = on_sample
        self._executors = []  # running ones; of those that have ended, their operators
        self._stop = threading.Event()

    def __enter__(self):
        from ray.data import DataContext

        _Callback.observers.append(self)
        _observe_in(DataContext.get_current())
        self._processes = _Processes()
        self._io_before = self._processes.io()
        self._store_before = _store_stats()
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self.seconds = self.elapsed()
        self._stop.set()
        self._thread.join()
        _Callback.observers.remove(self)
        self._note(lambda executor: True)
        self.executions = self._executors
        self.spilled_bytes = max(
            0, _store_stats().spilled_bytes_total - self._store_before.spilled_bytes_total
        )
        before, after = self._io_before, self._processes.io()
        known = before is not None and after is not None
        self.bytes_read = after[0] - before[0] if known else None
        self.bytes_written = after[1] - before[1] if known else None

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def watch(self, result) -> None:
        """Also see a Dataset that was made before anything was observed: it has its own context."""
        from ray.data import Dataset

        if isinstance(result, Dataset):
            _observe_in(result.context)

    def started(self, executor) -> None:
        # An executor holds on to its blocks, and one that was stopped early to an actor with its
        # CPUs, which the next one may need: see `settle`. So those that have ended go first.
        self._note(lambda executor: executor._shutdown)
        self._executors.append(executor)

    def _note(self, ended) -> None:
        """Keep what executions did, instead of them. The list stays in the order of their start."""
        noted = [
            _operators(one) if not isinstance(one, list) and ended(one) else one
            for one in self._executors
        ]
        if noted != self._executors:
            self._executors = noted
            gc.collect()

    def _sample(self):
        psutil.cpu_percent()  # the first call only starts the interval
        gpus = _Gpus()
        while not self._stop.wait(_SAMPLE_EVERY_S):
            self._look(gpus)
        if not self.samples:  # so short a run is seen once, at its end
            self._look(gpus)
        self.sampling_cost = time.thread_time() / max(self.elapsed(), 1e-9)

    def _look(self, gpus) -> None:
        held = _store_stats().object_store_bytes_used - self._store_before.object_store_bytes_used
        private = self._processes.private_bytes()
        gpu_percent, gpu_bytes = gpus.read()
        sample = Sample(
            at_s=self.elapsed(),
            cpu_percent=psutil.cpu_percent(),
            workers_bytes=sum(private),
            largest_worker_bytes=max(private, default=0),
            object_store_bytes=max(0, held),
            rows=_rows_so_far(self._executors),
            gpu_percent=gpu_percent,
            gpu_bytes=gpu_bytes,
            cpu_s=self._processes.cpu_s(),
        )
        self.samples.append(sample)
        if self._on_sample:
            self._on_sample(sample)


class _Callback:
    """Who is observing; Ray Data makes one callback object per execution."""

    observers: list[_Observer] = []
    cls = None


def _callback_class():
    """The class that Ray Data calls at each execution, built late: importing Ray takes time."""
    if _Callback.cls is None:
        from ray.data._internal.execution.execution_callback import ExecutionCallback

        class ObserveExecution(ExecutionCallback):
            def before_execution_starts(self, executor):
                for observer in _Callback.observers:
                    observer.started(executor)

        _Callback.cls = ObserveExecution
    return _Callback.cls


def _observe_in(context) -> None:
    classes = context.custom_execution_callback_classes
    if _callback_class() not in classes:
        classes.append(_callback_class())


def _operators(executor) -> list[Operator]:
    """What each operator of one execution did, first operator first."""
    found = []
    for op in executor._topology or {}:
        metrics, actors = op.metrics, type(op).__name__ == "ActorPoolMapOperator"
        found.append(
            Operator(
                name=op.name,
                tasks=metrics.num_tasks_finished,
                blocks=metrics.num_task_outputs_generated,
                rows=metrics.rows_task_outputs_generated,
                bytes_out=metrics.bytes_task_outputs_generated,
                actors=actors,
                task_s=metrics.task_completion_time_s,
                cpu_s=_cpu_seconds(op),
                replicas=op._actor_pool.min_size() if actors else 0,
            )
        )
    return found


def _cpu_seconds(op) -> float:
    blocks = [block for made in op.get_stats().values() for block in made]
    known = [block.exec_stats.cpu_time_s for block in blocks if block.exec_stats]
    return sum(seconds for seconds in known if seconds is not None)


def _rows_so_far(executors) -> int:
    """Rows that have left the last operator before a write, of the execution under way."""
    if not executors or isinstance(executors[-1], list) or not executors[-1]._topology:
        return 0
    operators = [op for op in executors[-1]._topology if op.name != "Write"]
    return operators[-1].metrics.row_outputs_taken if operators else 0


def _store_stats():
    """The object store of the whole cluster, as the raylets report it."""
    global _stub
    import ray
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    session = ray.get_runtime_context().get_session_name()
    if _stub is None or _stub[0] != session:
        from ray._private.grpc_utils import init_grpc_channel

        node = next(n for n in ray.nodes() if n["Alive"])
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        _stub = session, node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))
    request = node_manager_pb2.FormatGlobalMemoryInfoRequest(include_memory_info=False)
    return _stub[1].FormatGlobalMemoryInfo(request, timeout=10).store_stats


_stub = None


class _Processes:
    """Ray's processes on this node, and this one."""

    _FIND_EVERY_S = 1.0

    def __init__(self):
        self._node: list[psutil.Process] = []
        self._workers: dict[int, psutil.Process] = {}
        self._roles: dict[int, str] = {os.getpid(): "driver"}
        self._last_io: dict[int, tuple[int, int]] = {}
        self._last_cpu: dict[int, float] = {}
        self._at = 0.0
        self._find()
        self._cpu_before = self._read_cpu().copy()  # processes that start later begin at zero

    def _find(self) -> None:
        if time.monotonic() - self._at <= self._FIND_EVERY_S:
            return
        self._at = time.monotonic()
        self._node = _node_processes()
        for process in self._node:
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    for child in process.children(recursive=True):
                        self._workers.setdefault(child.pid, child)
        for process in self._workers.values():
            if self._roles.get(process.pid) != "actors":  # a worker that became one stays one
                self._roles[process.pid] = _role(process)

    def private_bytes(self) -> list[int]:
        """Memory of each worker that is its own: without the object store and shared libraries."""
        self._find()
        sizes = []
        for process in list(self._workers.values()):
            try:
                info = process.memory_info()
                sizes.append(info.rss - getattr(info, "shared", 0))
                if hasattr(process, "io_counters"):
                    counters = process.io_counters()
                    self._last_io[process.pid] = (counters.read_chars, counters.write_chars)
            except (psutil.Error, AttributeError):
                self._workers.pop(process.pid, None)
        return sizes

    def io(self) -> tuple[int, int] | None:
        """Bytes read and written by all workers seen so far, ended ones as last seen."""
        if not sys.platform.startswith("linux"):
            return None
        self._at = 0.0
        self.private_bytes()
        return (
            sum(read for read, _ in self._last_io.values()),
            sum(written for _, written in self._last_io.values()),
        )

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds since this object was made, by role; of ended processes as last seen."""
        self._find()
        used = dict.fromkeys(ROLES, 0.0)
        for pid, seconds in self._read_cpu().items():
            used[self._roles.get(pid, "ray")] += seconds - self._cpu_before.get(pid, 0.0)
        return used

    def _read_cpu(self) -> dict[int, float]:
        for process in [psutil.Process(), *self._node, *self._workers.values()]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._last_cpu[process.pid] = times.user + times.system
        return self._last_cpu


def _role(process: psutil.Process) -> str:
    """What a child of the raylet does. Ray names its workers for what they run at the moment."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return "ray"
    if title.startswith("ray::MapWorker"):
        return "actors"
    own = ("ray::_", "ray::ActorLocation", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return "tasks" if title.startswith("ray::") and not title.startswith(own) else "ray"


def _node_processes() -> list[psutil.Process]:
    """The processes of this session that are no workers: raylet, GCS and their like."""
    global _node
    if not _node or not all(process.is_running() for process in _node):
        import ray

        session = ray.get_runtime_context().get_session_name()
        _node = [
            process
            for process in psutil.process_iter(["cmdline"])
            if session in " ".join(process.info["cmdline"] or [])
            and "default_worker.py" not in process.info["cmdline"][1:2]
        ]
    return _node


_node: list[psutil.Process] = []


class _Gpus:
    """Utilization and memory of this node's NVIDIA devices; (None, None) without any."""

    def __init__(self):
        self._handles = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except Exception:  # no driver, no library, no permission: no GPU to watch
            self._nvml = None

    def read(self) -> tuple[float | None, int | None]:
        if not self._handles:
            return None, None
        busy = [self._nvml.nvmlDeviceGetUtilizationRates(h).gpu for h in self._handles]
        used = [self._nvml.nvmlDeviceGetMemoryInfo(h).used for h in self._handles]
        return float(np.mean(busy)), int(sum(used))
