"""What a rule gets, and the questions that several rules ask."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helpers.doctor import functions
from helpers.doctor.execution import Execution, Physical, Stage
from helpers.doctor.plan import paths_of
from helpers.doctor.report import Finding

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Rule:
    sees: str  # what the doctor looks at, for the mistake index
    check: Callable[["Case"], Iterator[Finding]]
    title: str = ""  # for an id that the catalog does not have


@dataclass
class Case:
    """Everything that was observed."""

    executions: list[Execution]
    calls: list
    collected: list[tuple[str, int]]

    def each(self) -> Iterator[tuple[Execution, Stage]]:
        for execution in self.executions:
            for stage in execution.stages:
                yield execution, stage

    def after(self, execution: Execution, stage: Stage) -> list[Stage]:
        """The steps behind one, also in executions that read what this one materialized."""
        steps = execution.after(stage)
        for call in self.calls:
            if _made(execution.call) & set(call.roots):
                steps += [s for other in call.executions for s in other.stages]
        return steps

    def before(self, execution: Execution, stage: Stage) -> list[Stage]:
        """The steps in front of one, also in the execution that materialized its input."""
        roots, steps = set(execution.call.roots if execution.call else ()), []
        for call in self.calls:
            if _made(call) & roots:
                steps += [s for other in call.executions for s in other.stages]
        return steps + execution.before(stage)

    def source_of(self, execution: Execution, physical: Physical) -> Physical | None:
        """The operator whose rows come in, also of the execution that materialized them."""
        source, roots = input_of(physical), set(execution.call.roots if execution.call else ())
        made = [c for c in self.calls if _made(c) & roots and c.executions]
        return source or (made[-1].executions[-1].operators[-1] if made else None)


def _made(call) -> set:
    return set(call.made) if call else set()


# ---- shared questions ---------------------------------------------------------------------------


def is_images(stage: Stage) -> bool:
    return stage.kind == "Read" and type(stage.op.datasource).__name__ == "ImageDatasource"


def is_media(stage: Stage) -> bool:
    """A read whose rows are whole files: images, bytes, audio, video, or downloads."""
    names = ("ImageDatasource", "BinaryDatasource", "AudioDatasource", "VideoDatasource")
    if stage.kind == "Read":
        return type(stage.op.datasource).__name__ in names
    return stage.kind == "Download"


def is_class(stage: Stage) -> bool:
    return stage.is_udf and type(stage.op.compute).__name__ == "ActorPoolStrategy"


def is_model(stage: Stage) -> bool:
    """A step that runs a model: by its name, or because its code builds one."""
    return stage.is_udf and (stage.code.looks_like_model or gpus_of(stage) > 0)


def gives_answers(stage: Stage) -> bool:
    """A step whose rows are answers of a model; a plain function tells by its name, or by the
    module that it calls."""
    return is_class(stage) or is_model(stage) or named_like_a_model(stage)


def named_like_a_model(stage: Stage) -> bool:
    code = stage.code
    named = functions.MODEL_NAME.search(code.name)
    return stage.is_udf and bool(code.looks_like_model or code.calls_module or named)


def gpus_of(stage: Stage) -> float:
    return float((getattr(stage.op, "ray_remote_args", None) or {}).get("num_gpus") or 0)


def only_a_look(execution: Execution) -> bool:
    """Only a look at a few rows."""
    return execution.consumer in ("take", "show", "schema", "take_batch")


def rows_into(stage: Stage) -> int | None:
    """Rows that a step got, where that is known."""
    physical = stage.physical
    if physical.stages and physical.stages[0] is stage:
        return physical.rows_in
    position = physical.stages.index(stage)
    if all(not s.op.can_modify_num_rows for s in physical.stages[1:position] if s.is_udf):
        first = physical.stages[0]
        if not first.is_read and first.kind != "Filter":
            return physical.rows_in
        if is_media(first) and position == 1:
            return len(paths_of(first.op.datasource)) or None
    if position == 1 and physical.stages[0].kind == "Read":
        known = physical.stages[0].op.infer_metadata().num_rows
        return physical.rows if known is None else known
    return physical.rows


def full_executions(case: Case) -> list[Execution]:
    return [e for e in case.executions if e.seconds is not None and not only_a_look(e)]


def users_blocks(stage: Stage) -> int | None:
    """The number of blocks that the user asked for in a read."""
    n = getattr(stage.op, "parallelism", None)
    return n if isinstance(n, int) and n > 0 else None


def sized_blocks(execution: Execution, stage: Stage) -> bool:
    """Whether the user chose how large the blocks are: then a whole one is a decision."""
    return any(
        s.kind in ("StreamingRepartition", "Repartition") or (s.is_read and users_blocks(s))
        for s in execution.before(stage)
    )


def bytes_per_row(physical: Physical) -> float | None:
    return physical.bytes_out / physical.rows if physical.rows else None


def tensor_columns(schema) -> dict[str, tuple[str, tuple | None, int]]:
    """Tensor columns: name -> (type of the numbers, shape or None when it varies, dimensions)."""
    found = {}
    for name, kind in zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False):
        label = type(kind).__name__
        if label == "ArrowVariableShapedTensorType":
            found[name] = (str(kind.value_type), None, kind.ndim)
        elif label in ("ArrowTensorType", "ArrowTensorTypeV2", "FixedShapeTensorType"):
            found[name] = (str(kind.value_type), tuple(kind.shape), len(kind.shape))
        elif label == "TensorDtype":
            shape = kind.element_shape
            fixed = None if shape is None or any(s is None for s in shape) else tuple(shape)
            found[name] = (str(kind.element_dtype), fixed, len(shape or ()) or 1)
    return found


def pixel_columns(schema) -> dict[str, tuple[str, tuple | None, int]]:
    """Tensor columns that have the form of images or stacks of them."""
    found = {}
    for name, (kind, shape, ndim) in tensor_columns(schema).items():
        if ndim < 3 and not (ndim == 2 and shape and min(shape) >= 28):
            continue
        if shape is not None and elements(shape) < 28 * 28:
            continue
        found[name] = (kind, shape, ndim)
    return found


def binary_columns(schema) -> list[str]:
    """Columns of bytes, or of Python objects such as PIL images, which Ray Data pickles."""
    types = zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False)
    return [
        name
        for name, kind in types
        if str(kind) in ("binary", "large_binary") or type(kind).__name__ == "ArrowPythonObjectType"
    ]


def elements(shape) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


WIDTH = {
    "double": 8,
    "float": 4,
    "halffloat": 2,
    "float64": 8,
    "float32": 4,
    "int64": 8,
    "int32": 4,
}


def tensor_bytes(kind: str, shape) -> int:
    return elements(shape) * WIDTH.get(kind, 1)


def schema_into(stage: Stage):
    """The schema of the rows that a step gets, when none of its operator has changed them yet."""
    physical = stage.physical
    keeps = ("Sort", "RandomShuffle", "Repartition", "StreamingRepartition", "Limit", "Filter")
    earlier = physical.stages[: physical.stages.index(stage)]
    if len(physical.inputs) == 1 and all(s.kind in keeps for s in earlier):
        return physical.inputs[0].schema
    return None


def input_of(physical: Physical) -> Physical | None:
    """The operator whose rows come in; a limit or a shuffle passes on what it gets."""
    while len(physical.inputs) == 1:
        physical = physical.inputs[0]
        if physical.rows:
            return physical
    return None


def input_row_bytes(physical: Physical) -> float | None:
    """Bytes of a row that comes in."""
    source = input_of(physical)
    return bytes_per_row(source) if source else None


def amount(value: float, noun: str = "") -> str:
    text = f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:,.3g}"
    return f"{text} {noun}{'' if value == 1 else 's'}" if noun else text


def next_is_udf(physical: Physical) -> bool:
    return any(s.is_udf for o in physical.outputs for s in o.stages[:1])


def same_end(one: Execution, other: Execution) -> bool:
    ends = []
    for execution in (one, other):
        work = [s.signature for s in execution.stages if s.is_udf or s.kind == "Filter"]
        ends.append(work[-1:] or None)
    return ends[0] == ends[1]


def collected_bytes(call) -> float:
    """Bytes of the rows that a call brought to the driver."""
    physical = call.executions[-1].operators[-1]
    while not physical.rows and len(physical.inputs) == 1:
        physical = physical.inputs[0]  # a limit passes on what it gets
    return call.rows * (bytes_per_row(physical) or 0)


def sink_of(stage: Stage):
    return stage.op.datasink_or_legacy_datasource


def remote_arguments(physical: Physical) -> dict:
    kept = dict(physical.remote)
    for name in ("scheduling_strategy", "_generator_backpressure_num_objects", "_labels"):
        kept.pop(name, None)
    return {k: float(v) if k in ("num_cpus", "num_gpus") else str(v) for k, v in kept.items() if v}


def accidental_split(one: Physical, other: Physical) -> str:
    """Why two neighbors are not fused, when only a small difference keeps them apart."""
    if not one.stages or not other.stages:
        return ""
    last, first = one.stages[-1], other.stages[0]
    if any(s.fn is not None and s.code.waits_for_others for s in (last, first)):
        return ""  # it waits for the network, or a service bears only so many requests
    if {one.kind, other.kind} == {"tasks", "actors"} and last.is_udf and first.is_udf:
        # Two functions, of which the second runs in an actor only because it is fused with one.
        if not is_class(last) and not is_class(first):
            return _unequal_cpus(_cpus_asked(last), _cpus_asked(first))
        return _actors_for_nothing(one, first if is_class(first) else last)
    if one.kind != "tasks" or other.kind != "tasks":
        return ""
    if last.kind in ("Filter", "FlatMap") and getattr(first.op, "batch_size", None) is not None:
        return ""  # Ray Data never fuses these
    a, b = remote_arguments(one), remote_arguments(other)
    different = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    # The read of plain bytes or tables is not work for a CPU: another share for it is a decision.
    if different == {"num_cpus"} and _is_python(last) and _is_python(first):
        return _unequal_cpus(one.cpus, other.cpus)
    if not different and (_is_python(last) or is_images(last)) and first.is_udf:
        return _limited_alone(one, other)
    return ""


def _is_python(stage: Stage) -> bool:
    return stage.is_udf or (stage.kind == "Filter" and stage.fn is not None)


def _unequal_cpus(here: float, there: float) -> str:
    if here == there or max(here, there) > 1:
        return ""  # more than one CPU is asked for on purpose: threads
    return f"`num_cpus` is {here:g} here and {there:g} there"


def _cpus_asked(stage: Stage) -> float:
    return float((getattr(stage.op, "ray_remote_args", None) or {}).get("num_cpus") or 1)


def _actors_for_nothing(one: Physical, actor: Stage) -> str:
    """The class of one of two neighbors, where pixels cross and it keeps nothing from one batch to
    the next: a function would do, and be one operator with the other."""
    code = actor.code
    if not code.known or code.init_calls or code.looks_like_model or code.waits_for_others:
        return ""
    if code.uses_accelerator_library or actor.physical.gpus or not code.is_class:
        return ""
    given = (getattr(actor.op, f"fn_constructor_{kind}", None) for kind in ("args", "kwargs"))
    if any(given) or re.search(r"self\.\w+(\[.*?\])?\s*\W?=[^=]", code.call_text):
        return ""  # it is given something to keep, or finds it
    if not pixel_columns(one.schema) or (one.bytes_out or 0) < MIB:
        return ""
    return f"`{actor.name}` runs in actors of its own, and its class keeps nothing that needs one"


def _limited_alone(one: Physical, other: Physical) -> str:
    """The `size` or `concurrency` that one of two neighbors has and the other has not, where pixels
    cross for it."""
    limits = {
        stage.name: getattr(getattr(stage.op, "compute", None), "size", None)
        for stage in (one.stages[-1], other.stages[0])
    }
    (name, size), *rest = [(n, s) for n, s in limits.items() if s is not None] or [("", None)]
    if size is None or rest or not pixel_columns(one.schema) or (one.bytes_out or 0) < MIB:
        return ""
    return f"at most {size} tasks of `{name}` may run at once, and its neighbor has no such limit"


def swallowed(case: Case, mistake_id: str, mine) -> Iterator[Finding]:
    for _, stage in case.each():
        if not stage.is_udf or not mine(stage):
            continue
        where, dropped = stage.code.swallowed()
        if where:
            what = "drops the row, and nobody counts it"
            if not dropped:
                what = "becomes an ordinary row, and nobody can tell it from a real one"
            yield Finding(
                mistake_id,
                stage.name,
                f"an error {what} ({where})",
                "Catch the errors that you expect, mark the row in a column of its own, and "
                "count them",
                {},
                "code",
            )
