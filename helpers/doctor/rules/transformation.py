"""T: what happens to the rows on their way."""

import re
from collections.abc import Iterator

from helpers.doctor import functions
from helpers.doctor.execution import Execution, Physical, Stage
from helpers.doctor.report import Finding
from helpers.doctor.rules.case import (
    MIB,
    WIDTH,
    Case,
    accidental_split,
    amount,
    binary_columns,
    bytes_per_row,
    elements,
    gpus_of,
    input_row_bytes,
    is_class,
    is_images,
    is_media,
    is_model,
    next_is_udf,
    only_a_look,
    pixel_columns,
    rows_into,
    schema_into,
    sink_of,
    sized_blocks,
    tensor_bytes,
    tensor_columns,
)
from helpers.plots import megabytes


def t1(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf or only_a_look(execution):
            continue
        if stage.code.nested_pixel_loop():
            yield Finding(
                "T1",
                stage.name,
                "the code visits single elements of an array in Python loops within loops",
                "NumPy on whole arrays: one expression instead of the loops",
                {},
                "code",
            )
        rows = rows_into(stage) or 0
        found = _visited_values(stage, rows)
        if found:
            column, values = found
            yield Finding(
                "T1",
                stage.name,
                f"a Python loop visits the numbers in {column!r} one by one, {amount(values)} at "
                "most",
                "NumPy on the whole column, or on the whole array: one expression, no loop",
                {"values": values},
            )
        # Some thousand calls are nothing; a row that is a whole image is as fast as a batch.
        if (
            stage.kind == "MapRows"
            and rows >= 5000
            and stage.code.arithmetic_only()
            and (bytes_per_row(stage.physical) or 0) < 4096
        ):
            yield Finding(
                "T1",
                stage.name,
                f"{amount(rows)} calls of a Python function that only computes numbers from "
                "numbers",
                "`map_batches` with NumPy: the same expression on whole columns",
                {"calls": rows},
            )


def _visited_values(stage: Stage, rows: int) -> tuple[str, int] | None:
    """A column whose single numbers a Python loop computes with, and how many there are."""
    for column, depth in stage.code.column_loops():
        shape = _shape_of(stage, column)
        if shape is None:
            continue
        levels = len(shape) + (stage.kind == "MapBatches")
        values = rows * int(elements(shape))
        # Some thousand take a millisecond. A loop over rows of arrays is not one over numbers.
        if (depth == levels or depth >= functions.EVERY_NUMBER) and values >= 5000:
            return column, values
    return None


_KEEP_COLUMNS = ("Filter", "Limit", "Project")


def _shape_of(stage: Stage, column: str) -> tuple | None:
    """The shape of one value of a column that a step gets: () for a number, None: not known."""
    schema = schema_into(stage)
    before = stage.physical.stages[: stage.physical.stages.index(stage)]
    read = before[0] if before and before[0].kind == "ReadFiles" else None
    if read is not None and all(s.kind in _KEEP_COLUMNS for s in before[1:]):
        schema = read.op.scanner.schema
    if schema is None and stage is stage.physical.stages[-1]:  # what it passes on, it got
        schema = None if stage.code.changes_column(column) else stage.physical.schema
    tensor = tensor_columns(schema).get(column)
    if tensor is not None:
        return tensor[1]
    for name, kind in zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False):
        if name == column:
            text = str(kind)
            if re.fullmatch(r"u?int\d+|float|double|halffloat|float\d+|bool", text):
                return ()
            # How long lists are is not in the schema; the bytes of a row tell it, if it is all.
            row = input_row_bytes(stage.physical)
            row = row / len(schema.names) if row else None
            if read is not None and read.footers is not None and read.footers.rows:
                row = read.footers.columns.get(column, 0) / read.footers.rows
            if text.startswith(("list", "large_list")) and row and "list" not in text[6:]:
                width = 4 if re.search(r"int32|float\b", text) else 8
                return (int(row / width),)
    return None


_IN_INIT = "A class whose `__init__` builds the model, with `compute=ActorPoolStrategy(size=...)`"


def t2(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf:
            continue
        forgotten, tasks = stage.code.models_forgotten(), stage.physical.tasks or 0
        if forgotten and tasks > 2 * execution.cpus:  # a process for each core needs one anyway
            yield Finding(
                "T2",
                stage.name,
                f"`{forgotten[0].removeprefix('?.')}(...)` is kept in a global of the script, "
                f"which lasts for one task: built {amount(tasks, 'time')}",
                _IN_INIT,
                {"constructions": tasks},
            )
        built = stage.code.models_built()
        if not built:
            continue
        rows = rows_into(stage)
        size = stage.op.batch_size if stage.kind == "MapBatches" else 1
        calls = stage.physical.tasks or 0
        if rows and isinstance(size, int) and stage.kind != "FlatMap":
            calls = max(calls, -(-rows // size))
        if only_a_look(execution) and calls < 2:
            continue
        per = "batch" if stage.kind == "MapBatches" else "row"
        yield Finding(
            "T2",
            stage.name,
            f"`{built[0].removeprefix('?.')}(...)` stands in what is called for each {per}"
            + (f": at least {amount(calls, 'time')}" if calls else ""),
            _IN_INIT,
            {"constructions": calls},
            "code",
        )


def t3(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf or only_a_look(execution):
            continue
        physical = stage.physical
        rows = rows_into(stage)
        if rows is not None and rows < 8:
            continue
        change = (
            "`batch_size=` a number that suits the device: 8 to 32 on a CPU, 64 to 256 on a GPU"
        )
        if stage.kind == "MapBatches" and stage.op.batch_size == 1:
            calls = f": {amount(rows, 'call')} for {amount(rows, 'row')}" if rows else ""
            yield Finding(
                "T3", stage.name, f"`batch_size=1`{calls}", change, {"batch_size": 1}, "plan"
            )
        elif stage.kind == "MapRows" and is_class(stage) and is_model(stage):
            yield Finding(
                "T3",
                stage.name,
                "`map` calls the model once per row"
                + (f": {amount(rows)} forward passes of one row" if rows else ""),
                "`map_batches` with a model that takes a batch; " + change,
                {"batch_size": 1, "rows": rows},
                "plan",
            )
        elif (
            stage.kind == "MapBatches"
            and (loop := stage.code.forward_for_each_row())
            and _one_shape(execution, stage)
        ):
            yield Finding(
                "T3",
                stage.name,
                f"`{loop}` calls the model once for each row"
                + (f": {amount(rows)} forward passes of one row" if rows else ""),
                "`np.stack` or `torch.stack` the rows: one forward pass for each batch",
                {"batch_size": 1, "rows": rows},
                "code",
            )
        elif (
            rows
            and rows >= 64  # few images are no reason for another number
            and _explicit_batch(stage) >= max(128, rows)
            and not gpus_of(stage)
            and is_class(stage)
            and _gets_images(execution, stage)
        ):
            yield Finding(
                "T3",
                stage.name,
                f"`batch_size={stage.op.batch_size}` and {rows} rows: one call gets all of them, "
                "and nothing overlaps",
                change,
                {"batch_size": stage.op.batch_size, "rows": rows},
            )
        elif (
            stage.kind == "MapBatches"
            and stage.op.batch_size is None
            and (is_class(stage) or stage.code.is_class)  # or an object's method, in tasks
            and is_model(stage)
            and rows
            and physical.tasks
            # Blocks of a chosen size are a decision; one of many rows for everything is none.
            and (not sized_blocks(execution, stage) or (physical.tasks == 1 and rows >= 64))
        ):
            per_task = rows / physical.tasks
            row_bytes = input_row_bytes(physical)
            # A block of a few images does no harm; one of many rows is what the model gets at once.
            if per_task > 32 or per_task * (row_bytes or 0) > 16 * MIB:
                yield Finding(
                    "T3",
                    stage.name,
                    f"no `batch_size`: a batch is a whole block, here {amount(round(per_task))} "
                    "rows on "
                    "average",
                    change,
                    {"rows_per_batch": per_task},
                )


def _explicit_batch(stage: Stage) -> int:
    size = getattr(stage.op, "batch_size", None)
    return size if stage.kind == "MapBatches" and isinstance(size, int) else 0


def _gets_images(execution: Execution, stage: Stage) -> bool:
    """Whether a model gets images, and not what another has made of them."""
    before = execution.before(stage)
    if not is_model(stage) or any(is_model(s) for s in before):
        return False
    prepared = any(s.fn is not None and functions.resizes(s.fn) for s in before)
    return prepared or bool(pixel_columns(schema_into(stage)))


def _one_shape(execution: Execution, stage: Stage) -> bool:
    """Whether a step gets images of one shape; those of different shapes must come one by one."""
    pixels = pixel_columns(schema_into(stage))
    if pixels:
        return all(shape is not None for _, shape, _ in pixels.values())
    before = execution.before(stage)
    sized = any(is_images(s) and s.op.datasource.size is not None for s in before)
    return sized or any(s.fn is not None and functions.resizes(s.fn) for s in before)


def t4(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            stages = [s for s in physical.stages if s.is_udf]
            last = _moved(physical)
            rows = physical.rows  # a shuffle that it is fused with does not count its own
            rows = rows or next((p.rows_in for p in last.outputs), None)
            if not stages or not rows:
                continue
            kept = execution.call and execution.call.parts and not physical.outputs
            following = case.after(execution, stages[-1]) if kept else []
            if not next_is_udf(last) and not any(s.is_udf for s in following):
                continue
            images = any(is_media(s) for s in case.before(execution, stages[-1]))
            if not images and not _uint8_in(physical) and not any(s.code.decodes for s in stages):
                continue
            for name, (kind, shape, ndim) in tensor_columns(physical.schema).items():
                floats = kind in ("float", "double", "halffloat", "float32", "float64")
                if not floats or ndim < 3 or (shape and elements(shape) < 3 * 32 * 32):
                    continue
                if name in tensor_columns(physical.inputs[0].schema if physical.inputs else None):
                    before = tensor_columns(physical.inputs[0].schema)[name][0]
                    if before == kind:
                        continue  # it came as floats
                bits = {"double": "float64", "float": "float32"}.get(kind, kind)
                mine = rows * tensor_bytes(kind, shape) if shape else physical.bytes_out
                yield Finding(
                    "T4",
                    physical.name,
                    f"column {name!r} leaves as {bits}: {megabytes(mine)} for {amount(rows)} "
                    f"rows, and a pixel has one byte: {megabytes(mine / WIDTH.get(kind, 1))} "
                    "as uint8",
                    "Ship uint8, and normalize in the model's actor after the transfer",
                    {"bytes_out": mine, "bytes_as_uint8": mine // WIDTH.get(kind, 1)},
                )
                break


def _moved(physical: Physical) -> Physical:
    """The last operator that hands on the rows of one as they are, only in another order."""
    while len(physical.outputs) == 1:
        following = physical.outputs[0]
        if any(s.kind not in ("RandomShuffle", "Repartition", "Sort") for s in following.stages):
            break
        physical = following
    return physical


def _uint8_in(physical: Physical) -> bool:
    schemas = [p.schema for p in physical.inputs]
    schemas += [s.op.scanner.schema for s in physical.stages if s.kind == "ReadFiles"]
    columns = [column for schema in schemas for column in tensor_columns(schema).values()]
    return any(kind == "uint8" and ndim >= 3 for kind, _, ndim in columns)


def t5(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        physical = stage.physical
        if not (is_class(stage) or is_model(stage)) or not physical.rows:
            continue
        if physical.stages[-1] is not stage or not stage.code.known:
            continue
        if not (is_model(stage) or _adds_column(stage)):
            continue
        later = execution.after(stage)
        source = schema_into(stage)
        heavy = []
        for name, (kind, shape, _) in pixel_columns(physical.schema).items():
            size = tensor_bytes(kind, shape) if shape else None
            heavy.append((name, size))
        row_bytes = bytes_per_row(physical) or 0
        if not heavy and row_bytes >= 10_000:
            heavy = [(name, None) for name in binary_columns(physical.schema)]
        for name, size in heavy:
            came_in = source is None or name in getattr(source, "names", ())
            renamed = f"['{name}']" not in stage.code.text and name not in stage.code.strings
            if stage.code.changes_column(name) or not (came_in or _copied(stage, name) or renamed):
                continue
            if _needed_later(later, name):
                continue
            carried = size * physical.rows if size else physical.bytes_out
            if carried < 100_000:  # a handful of thumbnails
                continue
            yield Finding(
                "T5",
                stage.name,
                f"column {name!r} passes through the model: {megabytes(carried)} of the "
                f"{megabytes(physical.bytes_out)} that leave it, for {amount(physical.rows)} rows",
                "Return only what somebody downstream reads: the key and the result",
                {"bytes_carried": carried, "bytes_out": physical.bytes_out, "rows": physical.rows},
            )
            break


def _adds_column(stage: Stage) -> bool:
    source = schema_into(stage)
    if source is None:
        return False
    before = set(getattr(source, "names", ()))
    return bool(set(getattr(stage.physical.schema, "names", ())) - before)


def _copied(stage: Stage, name: str) -> bool:
    """`{"name": batch["any other column"]}` in the code."""
    import ast

    parameter = stage.code.parameter
    for body in stage.code.body:
        for node in ast.walk(body):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        text = ast.unparse(value)
                        return bool(re.fullmatch(rf"{parameter}\[['\"]\w+['\"]\]", text))
    return False


def _needed_later(later: list[Stage], name: str) -> bool:
    for stage in later:
        reads = stage.is_udf or (stage.kind == "Filter" and stage.fn is not None)
        if reads and (not stage.code.known or name in stage.code.strings):
            return True
        if stage.kind == "Write" and "Image" in type(sink_of(stage)).__name__:
            return True
    return False


def t6(case: Case) -> Iterator[Finding]:
    seen = set()  # the same steps may run in several executions, each with other neighbors
    for execution in case.executions:
        for physical in execution.operators:
            if len(physical.outputs) != 1:
                continue
            following = physical.outputs[0]
            why = accidental_split(physical, following)
            if not why or following.stages[0].signature in seen:
                continue
            seen.add(following.stages[0].signature)
            size = (
                f"; {megabytes(physical.bytes_out)} went from one to the other"
                if physical.rows
                else ""
            )
            yield Finding(
                "T6",
                f"{physical.name} | {following.name}",
                f"two operators instead of one: {why}{size}",
                "The same `num_cpus` and `concurrency` (or none) on maps that belong together; a "
                "split should be a decision",
                {"bytes_between": physical.bytes_out},
                "plan",
            )


def t7(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            if physical.kind != "actors" or physical.gpus or only_a_look(execution):
                continue
            model = next((s for s in physical.stages if is_class(s)), None)
            if model is None:
                continue
            inside = physical.stages[: physical.stages.index(model)]
            work = [s for s in inside if s.is_udf or is_images(s)]
            media = any(is_media(s) for s in execution.before(model))
            heavy = any(
                is_images(s) or s.code.decodes or functions.resizes(s.fn)
                for s in work
                if s.fn or s.is_read
            )
            if not work or not (heavy or (media and any(s.is_udf for s in work))):
                continue  # light work is well placed there
            largest = physical.pool[1] if physical.pool else 1
            if physical.has_run and largest == float("inf"):
                largest = max(physical.actors, 1)
            held = largest * max(physical.per_actor[0], 0)
            # All cores busy with actors, whatever they reserve: nobody is left to overlap with.
            if held > execution.cpus - 1 + 1e-6 or largest >= execution.cpus:
                continue
            names = " and ".join(s.name for s in work)
            yield Finding(
                "T7",
                physical.name,
                f"{names} runs inside the model's actors, one after the other: they hold "
                f"{held:g} of {amount(execution.cpus, 'CPU')}, the others cannot help",
                "Another `num_cpus` for the actor than for the map (0.99 is enough): then tasks "
                "prepare the next batch meanwhile",
                {"cpus_of_actors": held, "cpus": execution.cpus},
                "plan",
            )


def t8(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        if stage.kind != "MapBatches" or stage.op.batch_format != "pandas":
            continue
        tensors = tensor_columns(schema_into(stage))
        if not tensors:
            position = stage.physical.stages.index(stage)
            before = stage.physical.stages[position - 1] if position else None
            inputs = [p.schema for p in stage.physical.inputs]
            if before is not None and is_images(before):
                tensors = {"image": ("uint8", None, 3)}
            elif before is not None and before.is_udf and inputs:
                kept = tensor_columns(stage.physical.schema)
                tensors = {k: v for k, v in kept.items() if k in stage.code.strings} or {}
            if not tensors and stage.code.called("stack") and "np.stack" in stage.code.text:
                names = sorted(c for c in stage.code.strings if _stacks(stage.code, c))
                tensors = dict.fromkeys(names, ("?", None, 1))
        if tensors:
            yield Finding(
                "T8",
                stage.name,
                f'`batch_format="pandas"` with tensors in {", ".join(map(repr, tensors))}: each '
                "row "
                "becomes a Python object, and stacking them copies every byte",
                '`batch_format="numpy"` (the default): a view of the block',
                {"tensor_columns": len(tensors)},
                "plan",
            )
    yield from _pandas_iteration(case)


def _pandas_iteration(case: Case) -> Iterator[Finding]:
    for call in case.calls:
        last = call.executions[-1].operators[-1] if call.executions else None
        if last is None or call.keywords.get("batch_format") != "pandas":
            continue
        pixels = pixel_columns(last.schema)
        if pixels and (last.bytes_out or 0) >= 1e6:
            yield Finding(
                "T8",
                f"{call.name} of {last.name}",
                f'`batch_format="pandas"` with pixels in {", ".join(map(repr, pixels))}: each row '
                f"becomes a Python object, {megabytes(last.bytes_out)} in all",
                "Leave the pixels out of what is returned, or iterate over NumPy batches",
                {"bytes": last.bytes_out},
            )


def _stacks(code, column: str) -> bool:
    """Whether the text stacks `frame["column"]`, or what it makes of each value in it."""
    value = rf"{re.escape(code.parameter)}\[['\"]{re.escape(column)}['\"]\]"
    return bool(re.search(rf"np\.stack\((\[[^\[\]]* in )?{value}", code.text))


def _array_of_pil(execution: Execution, stage: Stage) -> bool:
    """Whether the step in front opens images with PIL and makes arrays of them."""
    before = [s for s in execution.before(stage) if s.is_udf][-1:]
    return any(
        s.code.called("PIL.Image.open") and "to array" in s.code.conversions() for s in before
    )


def t9(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf:
            continue
        steps = stage.code.conversions() + functions.composed(stage.fn)
        to_pil, to_array = steps.count("array to PIL"), steps.count("to array")
        there_and_back = {"array to PIL", "to tensor", "tensor to array"} <= set(steps)
        # An array that an earlier step made of a PIL image becomes one again, only to be a tensor.
        if to_pil and not to_array and "to tensor" in steps and _array_of_pil(execution, stage):
            there_and_back = True
            steps = ["PIL to array", *steps]
        # One conversion to resize with PIL and one back is the way to do it; more undo each other.
        if to_pil >= 2 or (to_pil and to_array and len(steps) >= 4) or there_and_back:
            yield Finding(
                "T9",
                stage.name,
                f"{len(steps)} conversions per image: {', '.join(steps)}",
                "Decode once, resize while it is a PIL image, then stay with arrays",
                {"conversions": len(steps)},
                "code",
            )


def t10(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        if not stage.is_udf and not (stage.kind == "Filter" and stage.fn is not None):
            continue
        floor = MIB if not is_class(stage) else 8 * MIB  # an actor loads it once
        large = [(name, size) for name, size in functions.captured(stage.fn) if size >= floor]
        if large:
            name, size = large[0]
            yield Finding(
                "T10",
                stage.name,
                f"the function carries {name!r} with {megabytes(size)} along"
                + (f", for {amount(stage.physical.tasks, 'task')}" if stage.physical.tasks else ""),
                "Build or load it in `__init__` of a class, or `ray.put` it once and pass the "
                "reference",
                {"bytes": size, "name": name},
                "code",
            )


def t11(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        if not stage.is_udf:
            continue
        autograd = stage.code.autograd(functions.constructor_arguments(stage.op))
        double = stage.code.float64()
        if autograd:
            yield Finding(
                "T11",
                stage.name,
                f"{autograd}, is called with autograd on: neither inference_mode nor no_grad "
                "stands "
                "in the class",
                "`with torch.inference_mode():` around the forward pass",
                {},
                "code",
            )
        elif double:
            yield Finding(
                "T11",
                stage.name,
                f"`{double}`: the model computes in 64 bits",
                "float32, or bfloat16 where the device has it",
                {},
                "code",
            )
