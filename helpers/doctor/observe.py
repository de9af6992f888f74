"""Looking on while Ray Data runs: every execution of this process, and who asked for it."""

import contextlib
import functools
import json
import os
import signal
import threading
import time
import traceback
import weakref

from helpers.doctor import rules
from helpers.doctor.execution import Call, Execution
from helpers.doctor.plan import (
    files_in_folder,
    planned,
    read_plan,
    roots_of,
    rows_in,
    take_statistics,
)
from helpers.doctor.report import Diagnosis

_LEAVE_S = 30  # for Ray Data's loop to see that it was interrupted: a task may have to start first
_STUCK_AFTER_S = 15  # without progress, and only where the plan proves that none can come
_STEP_S = 0.5


class Stuck(RuntimeError):
    """The execution waits for resources that this machine does not have."""


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
    execution = planned(dataset)
    execution.stuck = rules.cannot_start(execution)
    return Diagnosis(
        findings=rules.check([execution], []),
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
        self.blocked = ""  # why the doctor interrupted the main thread
        self._interrupted: threading.Thread | None = None  # Ray Data's loop in that case
        self._live: list = []
        self._leave = contextlib.ExitStack()  # undoes the hooks, the last one first
        self._thread = threading.local()
        self._streams: dict[str, Call] = {}

    def __enter__(self):
        import ray.data
        from ray.data._internal.execution.streaming_executor import StreamingExecutor

        self._patch(StreamingExecutor, "execute", self._execute)
        for name in _consuming(ray.data.Dataset):
            self._patch(ray.data.Dataset, name, functools.partial(self._consume, name))
        self._watch_writers()
        self._accept_interrupts()
        return self

    def __exit__(self, *exc):
        self._leave.close()
        if self._interrupted is not None:  # it goes on once it has the actors' CPUs
            self._interrupted.join(_LEAVE_S)
        self.settle()

    def diagnosis(self) -> Diagnosis:
        """The findings so far."""
        self.settle()
        findings = rules.check(self.executions, self.calls, self.collected)
        return Diagnosis(findings, len(self.executions), notes=list(dict.fromkeys(self.notes)))

    def settle(self) -> None:
        """Take the statistics of executions that were left before their end."""
        for recorder in self._live:
            recorder.settle()
        self._live = [r for r in self._live if not r.done]

    # -- hooks: each calls the original, and must never fail by itself

    def _patch(self, owner, name, wrapper):
        original = getattr(owner, name)
        self._leave.callback(setattr, owner, name, original)

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
            call.roots = tuple(roots_of(dataset._logical_plan.dag))
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
            if name in _KEEPING:
                dags = [d._logical_plan.dag for d in _as_list(result)]
                call.parts = len(dags)
                call.made = tuple(root for dag in dags for root in roots_of(dag))
                made = [dag.infer_metadata() for dag in dags]
                call.rows = sum(one.num_rows or 0 for one in made)
                call.bytes = sum(one.size_bytes or 0 for one in made)
        return result

    def call_for(self, dataset_id: str) -> Call | None:
        call = getattr(self._thread, "call", None)
        return call or self._streams.get(dataset_id.rsplit("_", 1)[0])

    def _watch_writers(self):
        """Writers that work on the driver: they tell where collected results go."""
        import csv

        import numpy as np
        import pandas as pd
        import pyarrow.parquet as pq

        for name in ("to_csv", "to_parquet", "to_json", "to_pickle", "to_feather", "to_excel"):
            self._patch(pd.DataFrame, name, functools.partial(self._driver_wrote, f"pandas {name}"))
        self._patch(pq, "write_table", functools.partial(self._driver_wrote, "pyarrow write_table"))
        self._patch(np, "save", self._numpy_saved)
        self._patch(json, "dump", functools.partial(self._driver_wrote, "json.dump"))
        writerows = functools.partial(self._driver_wrote, "csv writerows")
        self._patch(csv.DictWriter, "writerows", lambda f, me, rows: writerows(f, rows, me=me))

    def _accept_interrupts(self):
        """A shell lets what it starts in the background ignore SIGINT, which ends a blocked
        execution here."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._leave.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def _driver_wrote(self, writer, original, what, *args, me=None, **kwargs):
        with self._careful():
            rows = getattr(what, "num_rows", None)
            if rows is None and hasattr(what, "__len__"):
                rows = len(what)
            target = args[0] if args else kwargs.get("path_or_buf", kwargs.get("path", ""))
            if rows is not None and (writer != "pandas to_csv" or target is not None):
                self.collected.append((writer, int(rows)))
        return original(me, what) if me is not None else original(what, *args, **kwargs)

    def _numpy_saved(self, original, *args, **kwargs):
        with self._careful():
            array = args[1] if len(args) > 1 else kwargs.get("arr")
            if getattr(array, "shape", ()):
                self.collected.append(("numpy save", len(array)))
        return original(*args, **kwargs)

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


# Their results are in the object store, whole.
_KEEPING = {
    "materialize", "random_split", "split", "split_at_indices", "split_proportionately",
    "train_test_split",
}  # fmt: skip


def _as_list(result) -> list:
    return list(result) if isinstance(result, list | tuple) else [result]


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
        self._next = self._stepped = 0.0
        self._progress = (None, 0.0)

    def before_execution_starts(self, executor):
        with self.owner._careful():
            self._executor = weakref.ref(executor)
            self._start = time.perf_counter()
            plan = executor._topology, executor._options, executor._data_context
            self.execution = read_plan(*plan)
            self.execution.stuck = rules.cannot_start(self.execution)
            self.execution.call = self.owner.call_for(executor._dataset_id)
            if self.execution.call is not None:
                self.execution.call.executions.append(self.execution)
            self._spilled = _spilled_bytes()
            if self.execution.stuck:
                self._stepped = self._start
                threading.Thread(target=self._end_if_blocked, daemon=True).start()
            if self.execution.write is not None:
                self.execution.existing = files_in_folder(self.execution.write.op)
            self.owner.executions.append(self.execution)

    def on_execution_step(self, executor):
        now = self._stepped = time.perf_counter()
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

    def _end_if_blocked(self):
        """An all-to-all operator that waits for a CPU blocks Ray Data's loop, so no step follows in
        which the execution could be ended; the main thread, which waits for rows, still can."""
        with self.owner._careful():
            while not self.done:
                time.sleep(_STEP_S)
                if time.perf_counter() - self._stepped < 2 * _STUCK_AFTER_S:
                    continue
                executor = self._executor()
                if executor is None or not executor.is_alive():  # left early, not blocked
                    return
                if _pools_have_started(executor):  # until then, other tasks may have the CPUs
                    self.owner.blocked = self.execution.stuck
                    self.owner._interrupted = executor
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    return

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
            take_statistics(op, executor._topology[op], physical)
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
            if not error and execution.consumer.startswith("iter_") and execution.call:
                execution.call.rows = execution.operators[-1].rows  # to their end
            if execution.write is not None:
                before, after = execution.existing or {}, files_in_folder(execution.write.op) or {}
                execution.written = {k: v for k, v in after.items() if k not in before}
                # What Ray counts there are reports of the write, not rows.
                execution.write.physical.rows = rows_in(execution.written)


def _pools_have_started(executor) -> bool:
    """Asks Ray itself: a blocked loop does not notice that an actor is ready."""
    import ray

    for pool in (op._actor_pool for op in executor._topology if hasattr(op, "_actor_pool")):
        pending = list(pool._pending_actors)
        ready = ray.wait(pending, num_returns=len(pending), timeout=0)[0] if pending else []
        if pool.num_running_actors() + len(ready) < pool.min_size():
            return False
    return True


def _spilled_bytes() -> int:
    with contextlib.suppress(Exception):
        from helpers import measure

        return measure._store_stats().spilled_bytes_total
    return 0
