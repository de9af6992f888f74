"""The doctor: reads your own Ray Data pipeline and names the mistakes it finds.

    from helpers import doctor

    doctor.diagnose(dataset)              # from the plan, and from its statistics if it has run
    doctor.diagnose(dataset, run=True)    # runs it once, under observation
    with doctor.watch() as seen:          # whatever runs in here, with every execution
        ...
    seen.diagnosis()

In a terminal: `python -m helpers doctor my_script.py [its arguments]`; the script runs unchanged.

Three sources, in this order: the plan that Ray Data executes, the statistics of its operators, and
the text of the functions that were handed to it. It observes: it neither changes a setting nor runs
anything a second time. One exception: an execution that waits for a GPU or CPU which this machine
does not have would wait for half an hour; it is ended after some seconds.

The rules, with their thresholds, stand in `helpers.doctor_rules`. When in doubt they stay silent.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import time
import traceback
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from helpers import plots
from helpers.catalog import FAMILIES, MISTAKES

_STUCK_AFTER_S = 15  # without progress, and only where the plan proves that none can come
_STEP_S = 0.5
_MAX_LISTED = 20_000
_LESSONS = {
    "I": "02_ingestion",
    "T": "03_transformation",
    "R": "04_resources",
    "O": "05_output",
    "P": "07_production",
}


# ---- what is reported ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One mistake, with what proves it."""

    id: str
    operator: str
    evidence: str
    change: str
    numbers: dict = field(default_factory=dict)
    seen: str = "statistics"  # "plan", "statistics" or "code": where the evidence comes from

    @property
    def title(self) -> str:
        from helpers.doctor_rules import RULES

        return MISTAKES[self.id].title if self.id in MISTAKES else RULES[self.id].title

    @property
    def lesson(self) -> str:
        if self.id in MISTAKES:
            return MISTAKES[self.id].lesson
        return _LESSONS.get(self.id[:1], next(iter(FAMILIES.values())))

    def to_dict(self) -> dict:
        return {
            "id": self.id,
            "title": self.title,
            "operator": self.operator,
            "evidence": self.evidence,
            "numbers": self.numbers,
            "change": self.change,
            "lesson": self.lesson,
            "seen": self.seen,
        }


@dataclass
class Diagnosis:
    """All findings of one pipeline or script; shows itself in a notebook and in a terminal."""

    findings: list[Finding]
    executions: int
    not_run: bool = False  # only the plan was read
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def ids(self) -> list[str]:
        return sorted({f.id for f in self.findings})

    def __bool__(self) -> bool:
        return bool(self.findings)

    def to_dict(self) -> dict:
        from helpers.doctor_rules import CANNOT_SEE

        return {
            "version": 1,
            "executions": self.executions,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": self.notes,
            "cannot_see": CANNOT_SEE,
        }

    def _headline(self) -> str:
        looked = (
            "the plan only, nothing ran" if self.not_run else _plural(self.executions, "execution")
        )
        if self.healthy:
            return f"No mistake found ({looked})."
        return f"{_plural(len(self.findings), 'finding')} ({looked})."

    def _blind(self) -> str:
        from helpers.doctor_rules import CANNOT_SEE

        return "Not visible from plan, statistics and code: " + ", ".join(CANNOT_SEE) + "."

    def __str__(self) -> str:
        lines = [f"Doctor: {self._headline()}"]
        for f in self.findings:
            lines += [
                "",
                f"{f.id}  {f.title}",
                f"    operator  {f.operator}",
                f"    evidence  {f.evidence}",
                f"    change    {f.change}",
                f"    lesson    {f.lesson}",
            ]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join([*lines, "", self._blind()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        kind = "ok" if self.healthy else "wrong"
        panel = plots.panel(kind, self._headline(), [*self.notes, self._blind()])
        if self.healthy:
            return panel
        rows = [
            [f"{f.id} · {f.title}", f"`{f.operator}`: {f.evidence}", f.change, f.lesson]
            for f in self.findings
        ]
        header = ["mistake", "evidence", "change", "lesson"]
        return panel + plots.Table(header, rows)._repr_html_()


# ---- what was observed --------------------------------------------------------------------------


@dataclass(eq=False)
class Stage:
    """One step as the user wrote it: a logical operator."""

    kind: str  # class name of the logical operator: "Read", "MapRows", "MapBatches", "Write", ...
    op: object
    signature: tuple  # equal for the same work on the same data
    physical: "Physical" = field(default=None, repr=False)

    @property
    def fn(self):
        return getattr(self.op, "fn", None)

    @property
    def is_udf(self) -> bool:
        return self.kind in ("MapRows", "MapBatches", "FlatMap") and self.fn is not None

    @property
    def is_read(self) -> bool:
        return self.kind in ("Read", "ReadFiles")

    @property
    def code(self):
        from helpers import doctor_code

        return doctor_code.facts(self.fn)

    @property
    def name(self) -> str:
        return getattr(self.op, "name", None) or self.kind


@dataclass(eq=False)
class Physical:
    """One operator as Ray Data runs it; fused steps share one."""

    name: str
    kind: str  # "tasks", "actors", "input" or "other"
    stages: list[Stage]
    remote: dict  # ray remote arguments, after defaults
    inputs: list["Physical"]
    pool: tuple[int, float] | None = None  # actors: smallest and largest size
    task_limit: int | None = None
    per_actor: tuple[float, float] = (0.0, 0.0)  # CPUs, GPUs
    outputs: list["Physical"] = field(default_factory=list, repr=False)
    tasks: int | None = None  # None: it has not run
    blocks: int | None = None
    rows: int | None = None
    rows_in: int | None = None
    bytes_out: int | None = None
    busy_s: float = 0.0  # time in which its functions ran, summed over the workers
    actors: int = 0  # most that were alive at one time
    ready_s: float | None = None  # when the first actor was there, from the start
    schema: object = None

    @property
    def cpus(self) -> float:
        return float(self.remote.get("num_cpus") or 0)

    @property
    def gpus(self) -> float:
        return float(self.remote.get("num_gpus") or 0)

    @property
    def has_run(self) -> bool:
        return bool(self.tasks)


@dataclass(eq=False)
class Call:
    """One call of the user that consumed a dataset."""

    name: str
    keywords: dict
    roots: tuple  # the sources of the dataset's plan
    rows: int | None = None  # of what it returned
    bytes: int | None = None
    made: tuple = ()  # materialize: the source that the result is
    finished: bool = False
    executions: list["Execution"] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Execution:
    """One run of a plan, or (`seconds is None`) a plan that has not run."""

    operators: list[Physical]
    stages: list[Stage]
    call: Call | None
    cpus: float
    gpus: float
    local: bool  # Ray runs on this machine only and cannot grow
    preserve_order: bool = False
    target_block: int | None = None
    seconds: float | None = None
    errored_blocks: int = 0
    spilled: int = 0
    error: str = ""
    existing: dict[str, int] | None = None  # files in the folder of the write, before it
    written: dict[str, int] | None = None  # files that it wrote
    stuck: str = ""

    @property
    def consumer(self) -> str:
        return self.call.name if self.call else "iteration"

    @property
    def write(self) -> Stage | None:
        return next((s for s in self.stages if s.kind == "Write"), None)

    def before(self, stage: Stage) -> list[Stage]:
        return self.stages[: self.stages.index(stage)]

    def after(self, stage: Stage) -> list[Stage]:
        return self.stages[self.stages.index(stage) + 1 :]


class Stuck(RuntimeError):
    """The execution waits for resources that this machine does not have."""


# ---- the public interface -----------------------------------------------------------------------


def diagnose(dataset, run: bool = False) -> Diagnosis:
    """The mistakes in one dataset's pipeline.

    Reads the plan, and the statistics of its last execution if there was one. `run=True` executes
    it first (rows are counted and dropped). Inside `watch()` nothing of this is needed.
    """
    if run:
        with watch() as seen:
            for _ in dataset.iter_internal_ref_bundles():
                pass
        return seen.diagnosis()
    from helpers import doctor_rules

    execution = _planned(dataset)
    return Diagnosis(
        findings=doctor_rules.check([execution], []),
        executions=0 if execution.seconds is None else 1,
        not_run=execution.seconds is None,
    )


class watch:
    """Observes every Ray Data execution of this process until it is closed."""

    def __init__(self):
        self.executions: list[Execution] = []
        self.calls: list[Call] = []
        self.collected: list[tuple[str, int]] = []  # (writer, rows) that the driver itself wrote
        self.notes: list[str] = []
        self.from_items: dict = {}
        self._live: list = []
        self._undo: list = []
        self._thread = threading.local()
        self._streams: dict[str, Call] = {}

    def __enter__(self):
        import ray.data
        from ray.data._internal.execution.streaming_executor import StreamingExecutor

        self._patch(StreamingExecutor, "execute", self._execute)
        for name in _consuming(ray.data.Dataset):
            self._patch(ray.data.Dataset, name, functools.partial(self._consume, name))
        self._watch_writers()
        return self

    def __exit__(self, *exc):
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo = []
        self.settle()

    def diagnosis(self) -> Diagnosis:
        """The findings so far."""
        from helpers import doctor_rules

        self.settle()
        findings = doctor_rules.check(self.executions, self.calls, self.collected)
        return Diagnosis(findings, len(self.executions), notes=list(dict.fromkeys(self.notes)))

    def settle(self) -> None:
        """Take the statistics of executions that were left before their end."""
        for recorder in self._live:
            recorder.settle()
        self._live = [r for r in self._live if not r.done]

    # -- hooks: each calls the original, and must never fail by itself

    def _patch(self, owner, name, wrapper):
        original = getattr(owner, name)
        self._undo.append((owner, name, original))

        @functools.wraps(original)
        def patched(*args, **kwargs):
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, patched)

    def _execute(self, original, executor, dag, initial_stats=None, callbacks=None):
        with self._careful():
            recorder = _recorder_class()(self)
            self._live.append(recorder)
            callbacks = [*(callbacks or []), recorder]
        return original(executor, dag, initial_stats=initial_stats, callbacks=callbacks)

    def _consume(self, name, original, dataset, *args, **kwargs):
        if getattr(self._thread, "call", None) is not None:  # called by another one of them
            return original(dataset, *args, **kwargs)
        call = Call(name, dict(kwargs), ())
        with self._careful():
            call.roots = tuple(_roots(dataset._logical_plan.dag))
            self.calls.append(call)
            if name.startswith("iter") or name == "streaming_split":
                self._streams[dataset.get_dataset_id().rsplit("_", 1)[0]] = call
        self._thread.call = call
        try:
            result = original(dataset, *args, **kwargs)
        finally:
            self._thread.call = None
        with self._careful():
            call.finished = True
            if name in ("take_all", "to_pandas"):
                call.rows = len(result)
            if name == "materialize":
                call.made = tuple(_roots(result._logical_plan.dag))
                made = result._logical_plan.dag.infer_metadata()
                call.rows, call.bytes = made.num_rows, made.size_bytes
        return result

    def call_for(self, dataset_id: str) -> Call | None:
        call = getattr(self._thread, "call", None)
        return call or self._streams.get(dataset_id.rsplit("_", 1)[0])

    def _watch_writers(self):
        """Writers that work on the driver: they tell where collected results go."""
        import csv

        import pandas as pd
        import pyarrow.parquet as pq

        for name in ("to_csv", "to_parquet", "to_json", "to_pickle", "to_feather", "to_excel"):
            self._patch(pd.DataFrame, name, functools.partial(self._driver_wrote, f"pandas {name}"))
        self._patch(pq, "write_table", functools.partial(self._driver_wrote, "pyarrow write_table"))
        self._patch(json, "dump", functools.partial(self._driver_wrote, "json.dump"))
        writerows = functools.partial(self._driver_wrote, "csv writerows")
        self._patch(csv.DictWriter, "writerows", lambda f, me, rows: writerows(f, rows, me=me))

    def _driver_wrote(self, writer, original, what, *args, me=None, **kwargs):
        with self._careful():
            rows = getattr(what, "num_rows", None)
            if rows is None and hasattr(what, "__len__"):
                rows = len(what)
            target = args[0] if args else kwargs.get("path_or_buf", kwargs.get("path", ""))
            if rows is not None and (writer != "pandas to_csv" or target is not None):
                self.collected.append((writer, int(rows)))
        return original(me, what) if me is not None else original(what, *args, **kwargs)

    @contextlib.contextmanager
    def _careful(self):
        try:
            yield
        except Exception as error:  # observing must never break what is observed
            self.notes.append(
                f"The doctor lost sight of something: {type(error).__name__}: {error}"
            )
            if os.environ.get("COURSE_DOCTOR_DEBUG"):
                traceback.print_exc()


# ---- recording ----------------------------------------------------------------------------------


def _consuming(dataset_class) -> list[str]:
    wanted = {
        "aggregate", "count", "iter_batches", "iter_internal_ref_bundles", "iter_rows",
        "iter_torch_batches", "iter_tf_batches", "materialize", "max", "mean", "min",
        "random_split", "schema",
        "show", "size_bytes", "split", "split_at_indices", "split_proportionately", "std",
        "streaming_split", "sum", "take", "take_all", "take_batch", "to_arrow_refs",
        "to_numpy_refs", "to_pandas", "to_pandas_refs", "train_test_split", "unique",
    }  # fmt: skip
    return [n for n in dir(dataset_class) if n in wanted or n.startswith("write_")]


def _recorder_class():
    """The callback that Ray Data calls during one execution (built late: Ray is slow to import)."""
    global _Recorder
    if _Recorder is None:
        from ray.data._internal.execution.execution_callback import ExecutionCallback

        class Recorder(_Recording, ExecutionCallback):
            pass

        _Recorder = Recorder
    return _Recorder


_Recorder = None


class _Recording:
    def __init__(self, owner: watch):
        self.owner = owner
        self.done = False
        self.execution: Execution | None = None
        self._executor = lambda: None
        self._next = 0.0
        self._progress = (None, 0.0)

    def before_execution_starts(self, executor):
        with self.owner._careful():
            self._executor = weakref.ref(executor)
            self._start = time.perf_counter()
            self.execution = _read(executor._topology, executor._options, executor._data_context)
            self.execution.call = self.owner.call_for(executor._dataset_id)
            if self.execution.call is not None:
                self.execution.call.executions.append(self.execution)
            self._spilled = _spilled_bytes()
            if self.execution.write is not None:
                self.execution.existing = _files(self.execution.write.op)
            self.owner.executions.append(self.execution)

    def on_execution_step(self, executor):
        now = time.perf_counter()
        if now < self._next or self.execution is None:
            return
        self._next = now + _STEP_S
        with self.owner._careful():
            self._measure(executor)
        reason = self.execution.stuck
        done = [
            (op.metrics.num_outputs_taken, op.metrics.num_tasks_finished)
            for op in executor._topology
        ]
        if done != self._progress[0]:
            self._progress = (done, now)
        elif reason and now - self._progress[1] > _STUCK_AFTER_S:
            raise Stuck(f"{reason} The doctor ended this execution: it could not go on.")

    def after_execution_succeeds(self, executor):
        self._end(executor)

    def after_execution_fails(self, executor, error):
        self._end(executor, f"{type(error).__name__}: {error}")

    def settle(self):
        executor = self._executor()
        if executor is None:
            self.done = True
        elif not self.done and self.execution is not None:
            with self.owner._careful():
                self._measure(executor)
                self.execution.seconds = time.perf_counter() - self._start

    def _measure(self, executor):
        for op, physical in zip(executor._topology, self.execution.operators, strict=True):
            _statistics(op, executor._topology[op], physical)
            if physical.actors and physical.ready_s is None:
                physical.ready_s = time.perf_counter() - self._start

    def _end(self, executor, error=""):
        self.done = True
        if self.execution is None:
            return
        with self.owner._careful():
            self._measure(executor)
            execution = self.execution
            execution.seconds = time.perf_counter() - self._start
            execution.error = error
            execution.errored_blocks = executor._num_errored_blocks
            execution.spilled = max(0, _spilled_bytes() - self._spilled)
            if execution.write is not None:
                before, after = execution.existing or {}, _files(execution.write.op) or {}
                execution.written = {k: v for k, v in after.items() if k not in before}
                # What Ray counts there are reports of the write, not rows.
                execution.write.physical.rows = parquet_rows(execution.written)


def _read(topology, options, context) -> Execution:
    """The plan of one execution, before it runs. `topology`: physical operators, sources first."""
    import ray

    by_op, operators, stages, signatures = {}, [], [], {}
    owners = {}
    for op in topology:
        for logical in op._logical_operators:
            owners[id(logical)] = op  # of several operators for one step, the last
    for op in topology:
        physical = _physical(op, [by_op[d] for d in op.input_dependencies if d in by_op])
        by_op[op] = physical
        operators.append(physical)
        for upstream in physical.inputs:
            upstream.outputs.append(physical)
        for logical in op._logical_operators:
            if owners[id(logical)] is not op:
                continue
            stage = Stage(
                type(logical).__name__, logical, _signature(logical, signatures), physical
            )
            physical.stages.append(stage)
            stages.append(stage)
    resources = ray.cluster_resources()
    execution = Execution(
        operators=operators,
        stages=stages,
        call=None,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        local=_is_local(),
        preserve_order=bool(options.preserve_order),
        target_block=context.target_max_block_size,
    )
    from helpers import doctor_rules

    execution.stuck = doctor_rules.cannot_start(execution)
    return execution


def _physical(op, inputs) -> Physical:
    kinds = {"TaskPoolMapOperator": "tasks", "ActorPoolMapOperator": "actors"}
    kind = kinds.get(type(op).__name__, "other")
    if type(op).__name__ == "InputDataBuffer":
        kind = "input"
    physical = Physical(
        op.name, kind, [], dict(getattr(op, "_ray_remote_args", None) or {}), inputs
    )
    if kind == "actors":
        pool = op._actor_pool
        physical.pool = (pool.min_size(), pool.max_size())
        usage = pool.per_actor_resource_usage()
        physical.per_actor = (float(usage.cpu or 0), float(usage.gpu or 0))
    if kind == "tasks":
        physical.task_limit = getattr(op, "_max_concurrency", None)
    return physical


def _statistics(op, state, physical: Physical) -> None:
    metrics = op.metrics
    physical.tasks = metrics.num_tasks_finished
    physical.blocks = metrics.num_task_outputs_generated
    physical.rows = metrics.rows_task_outputs_generated
    physical.rows_in = metrics.num_row_inputs_received
    physical.bytes_out = metrics.bytes_task_outputs_generated
    physical.busy_s = metrics.block_transform_time_s or 0.0
    physical.actors = max(physical.actors, metrics.num_alive_actors or 0)
    physical.schema = getattr(state, "_schema", None) or physical.schema


def _planned(dataset) -> Execution:
    """The plan of a dataset; with the statistics of its last execution, if there was one."""
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = LogicalPlan(dataset._logical_plan.dag, dataset.context)
    dag = get_execution_plan(plan)[0].dag
    ordered = {}

    def visit(op):
        for upstream in op.input_dependencies:
            visit(upstream)
        ordered.setdefault(op)

    visit(dag)
    execution = _read(ordered, dataset.context.execution_options, dataset.context)
    with contextlib.suppress(Exception):  # statistics are a bonus here
        summary, known = dataset.get_stats_summary(), {}
        pending = [summary]
        while pending:
            part = pending.pop()
            known |= {s.operator_name: s for s in part.operators_stats}
            pending += part.parents
        for physical in execution.operators:
            found = known.get(physical.name)
            if found is not None:
                physical.tasks = found.task_rows.count if found.task_rows else found.wall_time.count
                physical.blocks = found.wall_time.count
                physical.rows = int(found.output_num_rows.sum)
                physical.bytes_out = int(found.output_size_bytes.sum)
                execution.seconds = max(execution.seconds or 0, found.time_total_s)
    for physical in execution.operators:
        if physical.inputs and all(p.rows is not None for p in physical.inputs):
            physical.rows_in = sum(p.rows for p in physical.inputs)
    return execution


def _roots(dag) -> list:
    """Names of the sources of a plan: blocks that exist already, or paths."""
    if not dag.input_dependencies:
        return [_source(dag)]
    return [root for upstream in dag.input_dependencies for root in _roots(upstream)]


def _source(op):
    blocks = op.output_data() if hasattr(op, "output_data") else None
    if blocks:
        return ("blocks", *(ref.hex() for bundle in blocks[:3] for ref in bundle.block_refs[:1]))
    paths = getattr(op, "source_paths", None) or getattr(op, "paths", None)
    datasource = getattr(op, "datasource", None)
    if datasource is not None:
        paths = paths_of(datasource)
        if not paths and type(datasource).__name__ == "RangeDatasource":
            paths = [op.infer_metadata().num_rows]  # the same numbers each time
        paths = paths or [id(datasource)]
    return (type(op).__name__, type(datasource).__name__, *map(str, paths or [id(op)]))


def paths_of(datasource) -> list[str]:
    """The files that a datasource reads; empty when it reads none."""
    try:
        return list(datasource._paths())
    except Exception:
        return []


def _signature(op, known) -> tuple:
    if id(op) not in known:
        upstream = tuple(_signature(o, known) for o in op.input_dependencies)
        own = _source(op) if not upstream else operation(op)
        known[id(op)] = hash((own, upstream)), op  # the operator is kept: its id stays taken
    return known[id(op)][0]


def operation(op) -> tuple:
    """What an operator does: equal for the same function with the same settings."""
    found = [type(op).__name__]
    for name in ("fn", "fn_args", "fn_kwargs", "fn_constructor_args", "fn_constructor_kwargs"):
        found.append(_value(getattr(op, name, None)))
    for name in ("batch_size", "limit", "num_outputs", "exprs", "predicate_expr", "sort_key"):
        value = getattr(op, name, None)
        found.append(str(value) if not callable(value) else id(value))
    return tuple(found)


_kept: dict[int, object] = {}  # objects whose id stands in a signature must not go away


def _value(value):
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return tuple(_value(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _value(v)) for k, v in value.items())
    if isinstance(value, functools.partial):
        return _value(value.func), _value(value.args), _value(value.keywords)
    code = getattr(value, "__code__", None)
    if code is not None:  # the same function, made again with the same contents
        _kept[id(code)] = code
        cells = []
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):
                cells.append(_value(cell.cell_contents))
        defaults = _value(getattr(value, "__defaults__", None))
        return id(code), tuple(cells), defaults, id(getattr(value, "__self__", None))
    _kept[id(value)] = value
    return id(value)


def _is_local() -> bool:
    """Whether this process started Ray itself: then no node will be added while it waits."""
    with contextlib.suppress(Exception):
        import ray._private.worker as worker

        return bool(worker._global_node and worker._global_node.head)
    return False


def _spilled_bytes() -> int:
    with contextlib.suppress(Exception):
        from helpers import measure

        return measure._store_stats().spilled_bytes_total
    return 0


def parquet_rows(files) -> int | None:
    """Rows in local Parquet files, from their footers; None when there are none, or other files."""
    import pyarrow.parquet as pq

    files = list(files)[:5000]
    if not files or not all(str(f).endswith(".parquet") for f in files):
        return None
    try:
        return sum(pq.read_metadata(f).num_rows for f in files)
    except (OSError, ValueError):
        return None


def _files(write) -> dict[str, int] | None:
    """Files below the folder that a write operator writes to, with their sizes; local ones only."""
    import pyarrow.fs

    sink = write.datasink_or_legacy_datasource
    filesystem = getattr(sink, "filesystem", None)
    filesystem = getattr(filesystem, "unwrap", lambda: filesystem)()
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return None
    found = {}
    for file in Path(sink.path).rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file():
                found[str(file)] = file.stat().st_size
        if len(found) >= _MAX_LISTED:
            break
    return found


# ---- the command line ---------------------------------------------------------------------------


def add_arguments(parser) -> None:
    """The arguments of `python -m helpers doctor`."""
    parser.add_argument("script", help="the Python script to run and observe")
    parser.add_argument(
        "arguments", nargs="...", metavar="...", help="arguments for the script; put -- before "
        "them when one of them is --json",
    )  # fmt: skip
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="findings as JSON: into FILE, or (--json alone) as the last line of the output",
    )


def split_arguments(arguments: list[str]) -> list[str]:
    """Let `--json` stand before or behind the script, with or without a file."""
    own, rest = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, rest = arguments[:at], arguments[at + 1 :]
    found, others, i = [], [], 0
    while i < len(own):
        if own[i] == "--json":
            following = own[i + 1] if i + 1 < len(own) else ""
            if following.endswith(".json"):
                i += 1
            found = [f"--json={following if following.endswith('.json') else '-'}"]
        elif own[i].startswith("--json="):
            found = [own[i]]
        else:
            others.append(own[i])
        i += 1
    return [*found, *others, *rest]


def main(options) -> int:
    """Run the script under observation. 0: no finding, 1: findings, 2: it could not run."""
    script = Path(options.script)
    if not script.is_file():
        print(f"doctor: there is no file {options.script}", file=sys.stderr)
        return 2
    try:
        source = compile(script.read_bytes(), str(script.resolve()), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        traceback.print_exception(type(error), error, None)
        print(f"doctor: {options.script} is not valid Python", file=sys.stderr)
        return 2
    import ray

    ours, before = sys.modules["__main__"], ray.is_initialized()
    try:
        with watch() as seen:
            failure = _run_script(source, script.resolve(), options.arguments)
            diagnosis = seen.diagnosis()
    finally:
        sys.modules["__main__"] = ours  # until now the script's functions were looked up there
    if ray.is_initialized() and not before:
        ray.shutdown()  # its last messages come before the findings
    sys.stdout.flush()
    if failure:
        print(f"doctor: {options.script} {failure}", file=sys.stderr)
    elif not seen.executions:
        diagnosis.notes.append("The script ran no Ray Data pipeline.")
    result = diagnosis.to_dict() | {"script": str(script), "failure": failure}
    if options.json is None:
        print(f"\n{diagnosis}" if not failure or diagnosis else "", flush=True)
    elif options.json == "-":
        print(json.dumps(result, default=float), flush=True)
    else:
        Path(options.json).write_text(json.dumps(result, indent=2, default=float) + "\n")
        print(f"\n{diagnosis}\n\nWritten to {options.json}", flush=True)
    return 2 if failure else 1 if diagnosis.findings else 0


def _run_script(source, script: Path, arguments: list[str]) -> str:
    """Execute a script as `python script` would; returns why it did not end well, or nothing."""
    import types

    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=str(script), __builtins__=__builtins__)
    saved = sys.argv, sys.path[:]
    sys.modules["__main__"], sys.argv = module, [str(script), *arguments]
    sys.path[0:1] = [str(script.parent)]
    try:
        exec(source, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            return f"ended with sys.exit({end.code!r})"
    except Stuck as stuck:
        print(f"doctor: {stuck}", file=sys.stderr)
    except KeyboardInterrupt:
        return "was interrupted"
    except BaseException as error:
        if _caused_by_stuck(error):
            print(f"doctor: {_caused_by_stuck(error)}", file=sys.stderr)
            return ""
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next  # the script's own traceback, without the doctor's lines
        traceback.print_exception(type(error), error, frames)
        return f"raised {type(error).__name__}"
    finally:
        sys.argv, sys.path[:] = saved
    return ""


def _caused_by_stuck(error) -> str:
    while error is not None:
        if isinstance(error, Stuck):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def catalog_column(mistake_id: str) -> str:
    """For the mistake index: how the doctor sees a mistake, or why it cannot."""
    from helpers.doctor_rules import CANNOT_SEE, RULES

    if mistake_id in RULES:
        return RULES[mistake_id].sees
    return "not visible: " + CANNOT_SEE.get(mistake_id, "there is no rule for it")
