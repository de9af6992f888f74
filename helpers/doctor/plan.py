"""Ray Data's plan of an execution, and the statistics of its operators, as an `Execution`."""

import contextlib
import functools
import os
from collections import defaultdict
from pathlib import Path

from helpers.doctor.execution import Execution, Footers, Physical, Stage

_MAX_LISTED = 20_000  # files of a folder


def columns_of(expression) -> set[str]:
    """The columns that an expression of Ray Data looks at."""
    from ray.data._internal.planner.plan_expression import expression_visitors

    return set(expression_visitors.get_column_references(expression))


def read_plan(topology, options, context) -> Execution:
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
            if stage.kind == "ReadFiles":  # now: a temporary file is gone at the end
                stage.footers = _footers(
                    parquet_files(getattr(listing(stage), "paths", None) or [])
                )
            physical.stages.append(stage)
            stages.append(stage)
    resources = ray.cluster_resources()
    return Execution(
        operators=operators,
        stages=stages,
        call=None,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        local=_is_local(),
        preserve_order=bool(options.preserve_order),
        target_block=context.target_max_block_size,
    )


def listing(read: Stage):
    """The step that knows the files of a read."""
    return read.op.input_dependencies[0] if read.kind == "ReadFiles" else read.op


def parquet_files(paths) -> list[str]:
    """The local Parquet files among paths and in folders; [] when one of them is not there."""
    found = []
    for path in paths:
        local = Path(str(path).removeprefix("file://"))
        if local.is_dir():
            found += [str(p) for p in sorted(local.rglob("*.parquet"))]
        elif local.is_file():
            found.append(str(local))
        else:
            return []
    return found


def _footers(paths: list[str], at_most: int = 64) -> Footers | None:
    """Of local Parquet files. None: not local, or too many."""
    import pyarrow.parquet as pq

    if not paths or len(paths) > at_most:
        return None
    rows, columns, sizes, row_groups = 0, defaultdict(int), [], 0
    try:
        for path in paths:
            footer = pq.read_metadata(path)
            rows += footer.num_rows
            row_groups += footer.num_row_groups
            sizes.append(os.path.getsize(path))
            for g in range(footer.num_row_groups):
                group = footer.row_group(g)
                for c in range(group.num_columns):
                    chunk = group.column(c)
                    name = chunk.path_in_schema.split(".")[0]
                    columns[name] += chunk.total_uncompressed_size
    except (OSError, ValueError):
        return None
    return Footers(rows, dict(columns), sizes, row_groups)


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


def take_statistics(op, state, physical: Physical) -> None:
    metrics = op.metrics
    physical.tasks = metrics.num_tasks_finished
    physical.blocks = metrics.num_task_outputs_generated
    physical.rows = metrics.rows_task_outputs_generated
    physical.rows_in = metrics.num_row_inputs_received
    physical.bytes_out = metrics.bytes_task_outputs_generated
    physical.busy_s = metrics.block_transform_time_s or 0.0
    physical.actors = max(physical.actors, metrics.num_alive_actors or 0)
    physical.schema = getattr(state, "_schema", None) or physical.schema


def planned(dataset) -> Execution:
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
    execution = read_plan(ordered, dataset.context.execution_options, dataset.context)
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


def roots_of(dag) -> list:
    """Names of the sources of a plan: blocks that exist already, or paths."""
    if not dag.input_dependencies:
        return [_source(dag)]
    return [root for upstream in dag.input_dependencies for root in roots_of(upstream)]


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


def rows_in(files) -> int | None:
    """Rows in local files of a write: Parquet by its footers, CSV and JSON by their lines. None for
    other files, and for more than a thousand of text."""
    files = list(files)
    suffixes = {Path(name).suffix for name in files}
    if suffixes == {".parquet"}:
        return parquet_rows(files)
    if len(files) > 1000 or suffixes not in ({".csv"}, {".json"}):
        return None
    total = 0
    for name in files:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            total += sum(1 for _ in file) - (suffixes == {".csv"})
    return total


def files_in_folder(write) -> dict[str, int] | None:
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
