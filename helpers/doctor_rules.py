"""The doctor's rules: one function per mistake, from what was observed to findings.

Each rule has a floor below which it stays silent, with its reason beside it. A false alarm is worse
than a missed finding: where an intended design looks the same as a mistake, there is no finding.
"""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs

from helpers import doctor_code
from helpers.doctor import Execution, Finding, Physical, Stage, operation, parquet_rows, paths_of
from helpers.plots import megabytes

_MIB = 2**20
_KIB = 2**10


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


def _made(call) -> set:
    return set(call.made) if call else set()


def check(executions, calls, collected=()) -> list[Finding]:
    """All findings, in the order of the ids; the same one at the same operator once."""
    case = Case(list(executions), list(calls), list(collected))
    found = {}
    for mistake_id, rule in RULES.items():
        try:
            for finding in rule.check(case):
                found.setdefault((mistake_id, finding.operator), finding)
        except Exception:  # a rule that stumbles over an unusual pipeline must not hide the others
            if os.environ.get("COURSE_DOCTOR_DEBUG"):
                raise
    return list(found.values())


# ---- shared questions ---------------------------------------------------------------------------


def _is_images(stage: Stage) -> bool:
    return stage.kind == "Read" and type(stage.op.datasource).__name__ == "ImageDatasource"


def _is_media(stage: Stage) -> bool:
    """A read whose rows are whole files: images, bytes, audio, video, or downloads."""
    names = ("ImageDatasource", "BinaryDatasource", "AudioDatasource", "VideoDatasource")
    if stage.kind == "Read":
        return type(stage.op.datasource).__name__ in names
    return stage.kind == "Download"


def _is_class(stage: Stage) -> bool:
    return stage.is_udf and type(stage.op.compute).__name__ == "ActorPoolStrategy"


def _is_model(stage: Stage) -> bool:
    """A step that runs a model: by its name, or because its code builds one."""
    return stage.is_udf and (stage.code.looks_like_model or _gpus(stage) > 0)


def _answers(stage: Stage) -> bool:
    """A step whose rows are answers of a model; a plain function tells by its name, or by the
    module that it calls."""
    return _is_class(stage) or _is_model(stage) or _named_like_a_model(stage)


def _named_like_a_model(stage: Stage) -> bool:
    code = stage.code
    named = doctor_code.MODEL_NAME.search(code.name)
    return stage.is_udf and bool(code.looks_like_model or code.calls_module or named)


def _gpus(stage: Stage) -> float:
    return float((getattr(stage.op, "ray_remote_args", None) or {}).get("num_gpus") or 0)


def _limited(execution: Execution) -> bool:
    """Only a look at a few rows."""
    return execution.consumer in ("take", "show", "schema", "take_batch")


def _rows_into(stage: Stage) -> int | None:
    """Rows that a step got, where that is known."""
    physical = stage.physical
    if physical.stages and physical.stages[0] is stage:
        return physical.rows_in
    position = physical.stages.index(stage)
    if all(not s.op.can_modify_num_rows for s in physical.stages[1:position] if s.is_udf):
        first = physical.stages[0]
        if not first.is_read and first.kind != "Filter":
            return physical.rows_in
        if _is_media(first) and position == 1:
            return len(paths_of(first.op.datasource)) or None
    if position == 1 and physical.stages[0].kind == "Read":
        known = physical.stages[0].op.infer_metadata().num_rows
        return physical.rows if known is None else known
    return physical.rows


def _full(case: Case) -> list[Execution]:
    return [e for e in case.executions if e.seconds is not None and not _limited(e)]


def _users_blocks(stage: Stage) -> int | None:
    """The number of blocks that the user asked for in a read."""
    n = getattr(stage.op, "parallelism", None)
    return n if isinstance(n, int) and n > 0 else None


def _row_bytes(physical: Physical) -> float | None:
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


def _pixels(schema) -> dict[str, tuple[str, tuple | None, int]]:
    """Tensor columns that have the form of images or stacks of them."""
    found = {}
    for name, (kind, shape, ndim) in tensor_columns(schema).items():
        if ndim < 3 and not (ndim == 2 and shape and min(shape) >= 28):
            continue
        if shape is not None and _count(shape) < 28 * 28:
            continue
        found[name] = (kind, shape, ndim)
    return found


def _binary(schema) -> list[str]:
    types = zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False)
    return [name for name, kind in types if str(kind) in ("binary", "large_binary")]


def _count(shape) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


_WIDTH = {
    "double": 8,
    "float": 4,
    "halffloat": 2,
    "float64": 8,
    "float32": 4,
    "int64": 8,
    "int32": 4,
}


def _tensor_bytes(kind: str, shape) -> int:
    return _count(shape) * _WIDTH.get(kind, 1)


def _schema_into(stage: Stage):
    """The schema of the rows that a step gets, when none of its operator has changed them yet."""
    physical = stage.physical
    keeps = ("Sort", "RandomShuffle", "Repartition", "StreamingRepartition", "Limit", "Filter")
    earlier = physical.stages[: physical.stages.index(stage)]
    if len(physical.inputs) == 1 and all(s.kind in keeps for s in earlier):
        return physical.inputs[0].schema
    return None


def _input_row_bytes(physical: Physical) -> float | None:
    """Bytes of a row that comes in; a limit passes on what it gets."""
    while len(physical.inputs) == 1:
        physical = physical.inputs[0]
        if physical.rows:
            return _row_bytes(physical)
    return None


def _n(value: float, noun: str = "") -> str:
    text = f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:,.3g}"
    return f"{text} {noun}{'' if value == 1 else 's'}" if noun else text


# ---- ingestion ----------------------------------------------------------------------------------


def i1(case: Case) -> Iterator[Finding]:
    """A filter that only looks at where a file lies, after all of them were read."""
    from_path = {
        "path",
        "label",
        "class",
        "class_name",
        "synset",
        "category",
        "uri",
        "file",
        "split",
    }
    for execution, stage in case.each():
        if stage.kind != "Filter" or stage.fn is None and not stage.op.predicate_expr:
            continue
        before = execution.before(stage)
        reads = [s for s in before if s.kind == "Read" and _is_media(s)]
        if len(reads) != 1 or any(_is_model(s) for s in before):
            continue
        if stage.fn is not None:
            used = stage.code.columns_used()
        else:
            used = set(re.findall(r"col\('(\w+)'\)", str(stage.op.predicate_expr)))
        if not used or not used <= from_path or stage.physical.rows is None or _limited(execution):
            continue
        files = len(paths_of(reads[0].op.datasource))
        kept = stage.physical.rows
        if files >= 8 and kept <= files / 2 and stage.physical.kind == "tasks":
            yield Finding(
                "I1",
                stage.name,
                f"{files} files were read and decoded, {kept} rows were kept; the filter only "
                "looks "
                f"at {', '.join(sorted(used))}",
                "Choose before reading: a list of paths or folders, `partition_filter=`, or "
                "`file_extensions=` of the read",
                {"files_read": files, "rows_kept": kept},
            )


def i2(case: Case) -> Iterator[Finding]:
    """Full-size pixels leave the read; somebody makes them small only afterwards."""
    for execution, stage in case.each():
        read = stage.physical
        if not _is_images(stage) or stage.op.datasource.size is not None or not read.rows:
            continue
        if not _leaves_read(stage) or _own_cpus(stage) not in (None, 1):
            continue  # fused with what follows, or I10
        following = [s for s in execution.after(stage) if s.is_udf][:2]
        if not read.outputs or not following:
            continue
        # Made smaller by name, or in effect: a function leaves hardly anything of the pixels. (What
        # a model in an actor gets has to cross the store.)
        left = following[0].physical.bytes_out
        gone = left is not None and read.bytes_out and left <= 0.1 * read.bytes_out
        gone = gone and not _is_class(following[0]) and not _is_model(following[0])
        if not gone and not any(s.code.resizes for s in following):
            continue
        if _accidental_split(read, read.outputs[0]):
            continue  # T6 names the cause
        if _too_few_files(stage, following[0].physical):
            continue  # of as many files as a real job has, both would be one operator
        # Of the files whose rows are left, when a fused filter dropped some.
        encoded = int(
            _encoded_bytes(stage) * min(1, read.rows / max(1, len(paths_of(stage.op.datasource))))
        )
        # Below 1 MB nobody notices; twice the files' own size is more than any rounding.
        if read.bytes_out >= 1e6 and encoded and read.bytes_out >= 2 * encoded:
            yield Finding(
                "I2",
                stage.name,
                f"{megabytes(read.bytes_out)} of decoded pixels went through the object store, the "
                f"files have {megabytes(encoded)}; they are made smaller only in the next operator",
                "Decode and resize in one step: `read_binary_files` or `download`, then a map that "
                "decodes and crops; or `size=` in `read_images`",
                {"bytes_out": read.bytes_out, "bytes_of_files": encoded, "rows": read.rows},
            )


def i3(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not _is_images(stage) or stage.op.datasource.size is not None:
            continue
        read, source = stage.physical, stage.op.datasource
        alone = _leaves_read(stage)
        shapes, ratio = _look_at_images(paths_of(source))
        ragged = alone and any(s is None for _, s, _ in tensor_columns(read.schema).values())
        ragged = ragged or len(shapes) > 1
        encoded = _encoded_bytes(stage)
        if source.mode is not None and not (alone and ragged and _next_is_udf(read)):
            continue  # fused with a map that makes the images equal: nothing ragged leaves
        if read.rows and encoded and read.stages[-1] is stage and not _limited(execution):
            ratio = read.bytes_out / encoded
        # Equal images without `size` are harmless; so is an estimate that is nearly right.
        if ragged and ratio >= 2:
            given = [f"`{k}`" for k in ("size", "mode") if getattr(source, k) is None]
            yield Finding(
                "I3",
                stage.name,
                f"no {' and no '.join(given)}: images of {_shapes(shapes)}; decoded they are "
                f"{ratio:.1f} times as large as Ray Data's estimate, which is the files' size",
                '`read_images(..., size=(height, width), mode="RGB")`, or decode and crop in a map '
                "of your own",
                {"different_shapes_in_sample": len(shapes), "decoded_to_estimate": round(ratio, 2)},
                "statistics" if read.rows else "plan",
            )


def _too_few_files(read: Stage, following: Physical) -> bool:
    """Whether only this keeps two operators apart: Ray Data splits the blocks of a read of fewer
    files than two for each CPU, and fuses nothing with it."""
    one = read.physical
    alike = following.kind == one.kind == "tasks" and _remote(one) == _remote(following)
    return alike and "->SplitBlocks(" in one.name and _users_blocks(read) is None


def _leaves_read(stage: Stage) -> bool:
    """Whether the images leave the operator as they were read; a fused filter changes none."""
    later = stage.physical.stages[stage.physical.stages.index(stage) + 1 :]
    return all(s.kind == "Filter" for s in later)


def _shapes(shapes) -> str:
    if len(shapes) < 2:
        return "different shapes"
    some = ", ".join("x".join(map(str, s)) for s in sorted(shapes, key=str)[:3])
    return f"at least {len(shapes)} different shapes ({some}, ...)"


def _next_is_udf(physical: Physical) -> bool:
    return any(s.is_udf for o in physical.outputs for s in o.stages[:1])


def _encoded_bytes(stage: Stage) -> int:
    with contextlib.suppress(Exception):
        return int(sum(stage.op.datasource._file_sizes()))
    return 0


def _look_at_images(paths, at_most: int = 16):
    """Different shapes among some local files (headers only), and decoded to encoded bytes."""
    from PIL import Image

    shapes, decoded, encoded = set(), 0, 0
    step = max(1, len(paths) // at_most)
    for path in paths[::step][:at_most]:
        with contextlib.suppress(Exception):
            with Image.open(path) as image:
                bands = len(image.getbands())
                shapes.add((*image.size, image.mode))
                decoded += image.size[0] * image.size[1] * bands
            encoded += os.path.getsize(path)
    return shapes, decoded / encoded if encoded else 0.0


def i4(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if stage.kind == "Filter" and stage.fn is not None:
            yield from _late_filter(execution, stage)
        elif stage.kind == "ReadFiles" and not _limited(execution):
            yield from _unused_columns(execution, stage)


def _late_filter(execution: Execution, stage: Stage) -> Iterator[Finding]:
    before = execution.before(stage)
    if (
        not before
        or before[-1].kind not in ("ReadFiles", "Project")
        or not stage.code.expressible()
    ):
        return
    read = next((s for s in before if s.kind == "ReadFiles"), None)
    if read is None or any(s.is_udf for s in before) or _limited(execution):
        return
    used = stage.code.columns_used()
    columns = set(getattr(read.op.scanner.schema, "names", ()))
    if not used or not used <= columns:
        return
    footers = _footers(read)
    total = footers.rows if footers else None
    kept = stage.physical.rows
    if total is not None and kept is not None and kept > 0.9 * total:
        return  # nearly everything is kept: nothing to gain
    amount = (
        f"{kept} of {total} rows were kept, all were read" if total and kept is not None else ""
    )
    yield Finding(
        "I4",
        stage.name,
        "the filter is a Python function that compares columns with constants, so the Parquet "
        "reader "
        "cannot use it" + (f": {amount}" if amount else ""),
        f'`filter(expr=...)`, for example `col("{sorted(used)[0]}") > ...`: it moves into the read',
        {"rows_in_files": total, "rows_kept": kept},
        "plan",
    )


def _unused_columns(execution: Execution, read: Stage) -> Iterator[Finding]:
    pruned = read.op.scanner.pruned_column_names()
    columns = list(pruned if pruned is not None else read.op.scanner.schema.names)
    used = set()
    for stage in execution.after(read):
        if stage.kind == "Filter":
            here = stage.code.columns_used() if stage.fn is not None else None
            if here is None:
                return
            used |= here
        elif stage.is_udf:
            here = stage.code.columns_used()
            if here is None:
                return
            used |= here
            break
        else:
            return  # anything else may need all of them
    else:
        return
    unused = [c for c in columns if c not in used]
    footers = _footers(read)
    if not used or not unused or footers is None or not used <= set(columns):
        return
    total = sum(footers.columns.get(c, 0) for c in columns)
    wasted = sum(footers.columns.get(c, 0) for c in unused)
    share = wasted / total if total else 0
    # One unused id is nothing. Much of a small table, or half of a large one, is worth a line.
    large = wasted >= _MIB and share >= 0.5
    if large or (wasted >= 32 * _KIB and share >= 0.8) or (len(unused) >= 4 and share >= 0.5):
        yield Finding(
            "I4",
            read.name,
            f"{len(columns)} columns are read and {_n(len(used))} used "
            f"({', '.join(sorted(used)[:4])}); "
            f"the others are {share:.0%} of {megabytes(total)}",
            f"`read_parquet(...).select_columns({sorted(used)[:4]})`: it moves into the read",
            {"columns_read": len(columns), "columns_used": len(used), "bytes_unused": wasted},
        )


@dataclass
class _Footers:
    rows: int
    columns: dict[str, int]  # uncompressed bytes
    files: list[int]  # sizes


def _footers(read: Stage, at_most: int = 64) -> _Footers | None:
    """Rows and bytes per column of local Parquet files. None: not local, or too many."""
    import pyarrow.parquet as pq

    paths = _parquet_files(getattr(_listing(read), "paths", None) or [])
    if not paths or len(paths) > at_most:
        return None
    rows, columns, sizes = 0, defaultdict(int), []
    try:
        for path in paths:
            footer = pq.read_metadata(path)
            rows += footer.num_rows
            sizes.append(os.path.getsize(path))
            for g in range(footer.num_row_groups):
                group = footer.row_group(g)
                for c in range(group.num_columns):
                    chunk = group.column(c)
                    name = chunk.path_in_schema.split(".")[0]
                    columns[name] += chunk.total_uncompressed_size
    except (OSError, ValueError):
        return None
    return _Footers(rows, dict(columns), sizes)


def _listing(read: Stage):
    return read.op.input_dependencies[0] if read.kind == "ReadFiles" else read.op


def _parquet_files(paths) -> list[str]:
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


def i5(case: Case) -> Iterator[Finding]:
    """Tables in many tiny files. Images are files of their own: there, one job proves nothing."""
    jobs = defaultdict(list)
    for execution, stage in case.each():
        trial = _limited(execution) or any(s.kind == "Limit" for s in execution.stages)
        if stage.kind == "Read" and _is_media(stage) and not trial:
            jobs[tuple(paths_of(stage.op.datasource))].append(stage)
    for paths, stages in jobs.items():
        mean = sum(_sizes(stages[0])) / max(1, len(paths))
        many = 100 if _is_remote(stages[0]) else 1000  # a request takes longer than an open
        if len(paths) >= many and len(stages) >= 2 and 0 < mean < 128 * _KIB:
            yield Finding(
                "I5",
                stages[0].name,
                f"{len(paths)} files with {megabytes(mean)} each on average, opened again by each "
                f"of {len(stages)} executions",
                "Pack them once into few Parquet files (about 128 MB each), and read those",
                {"files": len(paths), "mean_bytes": mean, "executions": len(stages)},
                "plan",
            )
    for _, stage in case.each():
        if not stage.is_read or _is_media(stage):
            continue
        if stage.kind == "ReadFiles":
            paths = _parquet_files(_listing(stage).paths)
            sizes = [os.path.getsize(p) for p in paths]
        else:
            sizes = _sizes(stage)
            paths = paths_of(stage.op.datasource)
        if any(set(paths) & set(other.written or {}) for other in case.executions):
            continue  # this script wrote them: O1 is the finding
        # 100 files that together would fit into one block of Ray Data (128 MiB).
        if len(sizes) >= 100 and sum(sizes) / len(sizes) < 128 * _KIB:
            yield Finding(
                "I5",
                stage.name,
                f"{len(sizes)} files with {megabytes(sum(sizes) / len(sizes))} each on average, "
                f"{megabytes(sum(sizes))} in all",
                "Pack them once into few Parquet files (about 128 MB each), and read those",
                {"files": len(sizes), "mean_bytes": sum(sizes) / len(sizes)},
                "plan",
            )


def _is_remote(stage: Stage) -> bool:
    filesystem = getattr(stage.op.datasource, "_filesystem", None)
    if hasattr(filesystem, "unwrap"):  # Ray's, which tries again
        filesystem = filesystem.unwrap()
    return filesystem is not None and not isinstance(filesystem, pyarrow.fs.LocalFileSystem)


def _sizes(stage: Stage) -> list[int]:
    with contextlib.suppress(Exception):
        return [int(s or 0) for s in stage.op.datasource._file_sizes()]
    return []


def i6(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        many = max(16, 4 * execution.cpus)  # that much helps to balance the load
        asked = None
        if stage.is_read:
            asked = _users_blocks(stage)
            how = f"`override_num_blocks={asked}`"
        elif stage.kind == "Repartition":
            asked = getattr(stage.op, "num_outputs", None)
            how = f"`repartition({asked})`"
        elif stage.kind.startswith("From"):
            blocks, rows = stage.op.num_outputs, stage.op.infer_metadata().num_rows
            if rows and blocks != min(rows, max(200, 2 * execution.cpus)):  # not Ray Data's own
                asked = blocks if stage.kind == "FromItems" else None
            how = f"`override_num_blocks={asked}`"
        if not asked or asked <= many:
            continue
        physical = stage.physical
        rows, size = physical.rows, physical.bytes_out
        if stage.kind.startswith("From"):
            meta = stage.op.infer_metadata()
            rows, size = meta.num_rows, meta.size_bytes
        elif len(physical.stages) > 1:
            size = None  # of what it was fused with
        if stage.kind == "Repartition":  # what it gets is what it gives
            rows = sum(p.rows or 0 for p in physical.inputs)
            size = sum(p.bytes_out or 0 for p in physical.inputs)
        if stage.kind == "Read" and (not rows or size is None):
            meta = stage.op.infer_metadata()
            rows, size = meta.num_rows or rows, meta.size_bytes
        if not rows:
            continue
        # Ray Data's own smallest block is 1 MiB; an eighth of it, or a row or two, is overhead.
        if rows / asked <= 2 or (size is not None and size / asked < 128 * _KIB):
            each = f"{_n(round(rows / asked, 1))} rows"
            each += f" and {megabytes(size / asked)}" if size is not None else ""
            yield Finding(
                "I6",
                stage.name,
                f"{how} for {rows} rows on {_n(execution.cpus, 'CPU')}: {each} per block",
                "Leave the number of blocks to Ray Data, or take 2 to 4 per CPU",
                {"blocks": asked, "rows": rows, "bytes": size, "cpus": execution.cpus},
                "plan",
            )


_SOURCES = {"FromPandas": "from_pandas", "FromArrow": "from_arrow", "FromNumpy": "from_numpy"}


def i7(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if execution.cpus < 2:
            continue
        if stage.kind == "Repartition" and getattr(stage.op, "num_outputs", None) == 1:
            how = "`repartition(1)`"
        elif (
            stage.is_read
            and _users_blocks(stage) == 1
            or stage.kind == "FromItems"
            and stage.op.num_outputs == 1
        ):
            how = "`override_num_blocks=1`"
        elif stage.kind in _SOURCES and stage.op.num_outputs == 1:
            how = f"one table in `{_SOURCES[stage.kind]}`"
        else:
            continue
        behind = [s for s in execution.after(stage) if s.is_udf]
        if not behind or behind[0].physical.tasks != 1 or _limited(execution):
            continue
        work = behind[0].physical
        # A small table is no loss in one piece: images, a megabyte or a second of work are.
        media = any(_is_media(s) for s in execution.before(behind[0]))
        rows = _rows_into(behind[0]) or 0
        size = max(work.bytes_out or 0, rows * (_input_row_bytes(work) or 0))
        if rows >= 16 and (media or size >= 1e6 or work.busy_s >= 1):
            yield Finding(
                "I7",
                behind[0].name,
                f"{how} leaves one block of {rows} rows ({megabytes(size)}): one task works, "
                f"{_n(execution.cpus - 1)} of {_n(execution.cpus, 'CPU')} wait",
                "Several blocks: no repartition, or 2 to 4 blocks per CPU",
                {"tasks": 1, "rows": rows, "bytes": size, "cpus": execution.cpus},
            )


def i8(case: Case) -> Iterator[Finding]:
    """`materialize` in the middle for a single reader, or large rows collected on the driver."""
    for call in case.calls:
        last = call.executions[-1].operators[-1] if call.executions else None
        if call.name == "materialize" and call.finished and last is not None:
            readers = [c for c in case.calls if c is not call and set(c.roots) & set(call.made)]
            # Who also counts, or looks at some rows, has a use for it.
            looks = ("count", "schema", "size_bytes", "show", "take", "take_batch")
            work = [c for c in readers if c.name not in looks]
            # What fits anywhere may be kept for a look; 64 MB are much for one.
            floor = 1e6 if len(readers) == len(work) else 64e6
            spilled = sum(e.spilled for e in call.executions)
            if len(work) != 1 and spilled >= _MIB:
                yield Finding(
                    "I8",
                    last.name,
                    f"`materialize()` keeps {megabytes(call.bytes or 0)}, more than the object "
                    f"store holds: {megabytes(spilled)} went to disk and come back for each reader",
                    "Stream, or keep something smaller: uint8 or encoded files instead of floats",
                    {"rows": call.rows, "bytes": call.bytes, "spilled_bytes": spilled},
                )
            elif len(work) == 1 and (call.bytes or 0) >= floor:
                yield Finding(
                    "I8",
                    last.name,
                    f"`materialize()` holds all {_n(call.rows or 0, 'row')} "
                    f"({megabytes(call.bytes)}) "
                    f"in the object store, and only `{work[0].name}` reads them, once",
                    "Leave `materialize()` out: the pipeline streams, and holds few blocks at "
                    "a time",
                    {"rows": call.rows, "bytes": call.bytes, "readers": 1},
                )
        if call.name in ("take_all", "to_pandas") and call.rows and last is not None:
            size, pixels = _collected_bytes(call), _pixels(last.schema)
            # Labels and scores fit on any driver; 64 MB, or 1 MB of images, is data, not a result.
            if size >= 64e6 or (pixels and size >= 1e6):
                what = f", with the pixels in {', '.join(pixels)}" if pixels else ""
                yield Finding(
                    "I8",
                    last.name,
                    f"`{call.name}()` brought {_n(call.rows, 'row')} ({megabytes(size)}{what}) "
                    "into the "
                    "driver",
                    "Write from the workers (`write_parquet`) or stream with `iter_batches`; "
                    "select "
                    "the columns that are needed",
                    {"rows": call.rows, "bytes": size},
                )


def _collected_bytes(call) -> float:
    """Bytes of the rows that a call brought to the driver."""
    physical = call.executions[-1].operators[-1]
    while not physical.rows and len(physical.inputs) == 1:
        physical = physical.inputs[0]  # a limit passes on what it gets
    return call.rows * (_row_bytes(physical) or 0)


def i9(case: Case) -> Iterator[Finding]:
    ran = defaultdict(list)
    for execution in _full(case):
        if execution.error:
            continue
        for signature in {s.signature for s in execution.stages if _costs(s, execution)}:
            ran[signature].append(execution)
    best = {}
    for signature, executions in ran.items():
        if len(executions) < 2 or all(e.consumer.startswith("iter") for e in executions):
            continue  # several epochs over a dataset are no mistake
        stage = next(s for s in executions[0].stages if s.signature == signature)
        key = tuple(id(e) for e in executions)
        depth = len(executions[0].before(stage))
        if key not in best or depth > best[key][0]:
            best[key] = (depth, stage, executions)
    for _, stage, executions in best.values():
        if any(len(k) > len(executions) and set(map(id, executions)) <= set(k) for k in best):
            continue  # part of a larger repetition that is reported
        again = [p.busy_s for e in executions[1:] for p in _work_up_to(e, stage.signature)]
        rows = stage.physical.rows
        consumers = ", ".join(f"`{e.consumer}`" for e in executions)
        whole = all(_same_end(e, executions[0]) for e in executions)
        # Branches that share their beginning may be meant; a model, or a second of work, is not.
        if not whole and not (_answers(stage) or _is_images(stage) or sum(again) >= 1):
            continue
        yield Finding(
            "I9",
            stage.name,
            f"computed {len(executions)} times from the start"
            + (f" over {_n(rows, 'row')}" if rows else "")
            + f": by {consumers}; {sum(again):.1f} s of work done again",
            "One execution: write once and read counts and samples from what was written, or "
            "`materialize()` a small result once and use it",
            {"executions": len(executions), "rows": rows, "seconds_again": round(sum(again), 2)},
        )


def _work_up_to(execution: Execution, signature: tuple) -> list[Physical]:
    """The operators that one step, and all in front of it, ran in. The look at the footers is not
    counted: most of its time is the start of a process."""
    at = next(i for i, s in enumerate(execution.stages) if s.signature == signature)
    steps = [s for s in execution.stages[: at + 1] if s.kind != "ListFiles"]
    return list(dict.fromkeys(s.physical for s in steps))


def _costs(stage: Stage, execution: Execution) -> bool:
    if any(s.kind == "Limit" for s in execution.after(stage)) and not any(
        s.kind == "Aggregate" for s in execution.after(stage)
    ):
        return False  # it did not run to its end
    return stage.is_udf or _is_images(stage) or stage.kind == "Download"


def _same_end(one: Execution, other: Execution) -> bool:
    ends = []
    for execution in (one, other):
        work = [s.signature for s in execution.stages if s.is_udf or s.kind == "Filter"]
        ends.append(work[-1:] or None)
    return ends[0] == ends[1]


def i10(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        cpus = _own_cpus(stage)
        if _is_images(stage) and cpus is not None and 0 <= cpus < 1:
            yield Finding(
                "I10",
                stage.name,
                f"the read asks for {cpus:g} CPUs, and each of its tasks decodes images with eight "
                "threads"
                + ("; it is an operator of its own" if len(stage.physical.stages) == 1 else ""),
                "No `num_cpus` on a read that decodes (the default, 1, is honest and lets it fuse)",
                {"num_cpus": cpus},
                "plan",
            )


def _own_cpus(stage: Stage) -> float | None:
    value = (getattr(stage.op, "ray_remote_args", None) or {}).get("num_cpus")
    return None if value is None else float(value)


def i11(case: Case) -> Iterator[Finding]:
    yield from _swallowed(case, "I11", lambda s: not _is_model(s))


def p2(case: Case) -> Iterator[Finding]:
    yield from _swallowed(case, "P2", _is_model)


def _swallowed(case: Case, mistake_id: str, mine) -> Iterator[Finding]:
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
                f"any error {what} ({where})",
                "Catch the errors that you expect, mark the row in a column of its own, and "
                "count them",
                {},
                "code",
            )


# ---- transformation -----------------------------------------------------------------------------


def t1(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf or _limited(execution):
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
        rows = _rows_into(stage) or 0
        found = _visited_values(stage, rows)
        if found:
            column, values = found
            yield Finding(
                "T1",
                stage.name,
                f"a Python loop visits each number in {column!r}: {_n(values)} of them",
                "NumPy on the whole column, or on the whole array: one expression, no loop",
                {"values": values},
            )
        # Some thousand calls are nothing; a row that is a whole image is as fast as a batch.
        if (
            stage.kind == "MapRows"
            and rows >= 5000
            and stage.code.arithmetic_only()
            and (_row_bytes(stage.physical) or 0) < 4096
        ):
            yield Finding(
                "T1",
                stage.name,
                f"{_n(rows)} calls of a Python function that only computes numbers from numbers",
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
        values = rows * int(_count(shape))
        # Some thousand take a millisecond. A loop over rows of arrays is not one over numbers.
        if depth == levels and values >= 5000:
            return column, values
    return None


def _shape_of(stage: Stage, column: str) -> tuple | None:
    """The shape of one value of a column that a step gets: () for a number, None: not known."""
    schema = _schema_into(stage)
    position = stage.physical.stages.index(stage)
    if position == 1 and stage.physical.stages[0].kind == "ReadFiles":
        schema = stage.physical.stages[0].op.scanner.schema
    tensor = tensor_columns(schema).get(column)
    if tensor is not None:
        return tensor[1]
    for name, kind in zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False):
        if name == column:
            text = str(kind)
            if re.fullmatch(r"u?int\d+|float|double|halffloat|float\d+|bool", text):
                return ()
            # How long lists are is not in the schema; the bytes of a row tell it, if it is all.
            row = _input_row_bytes(stage.physical)
            if text.startswith(("list", "large_list")) and row and "list" not in text[6:]:
                width = 4 if re.search(r"int32|float\b", text) else 8
                return (int(row / width / len(schema.names)),)
    return None


def t2(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        built = stage.code.models_built() if stage.is_udf else []
        if not built or _limited(execution):
            continue
        rows = _rows_into(stage)
        size = stage.op.batch_size if stage.kind == "MapBatches" else 1
        calls = stage.physical.tasks or 0
        if rows and isinstance(size, int) and stage.kind != "FlatMap":
            calls = max(calls, -(-rows // size))
        per = "batch" if stage.kind == "MapBatches" else "row"
        yield Finding(
            "T2",
            stage.name,
            f"`{built[0].removeprefix('?.')}(...)` stands in what is called for each {per}"
            + (f": at least {_n(calls, 'time')}" if calls else ""),
            "A class whose `__init__` builds the model, with `compute=ActorPoolStrategy(size=...)`",
            {"constructions": calls},
            "code",
        )


def t3(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not stage.is_udf or _limited(execution):
            continue
        physical = stage.physical
        rows = _rows_into(stage)
        if rows is not None and rows < 8:
            continue
        change = (
            "`batch_size=` a number that suits the device: 8 to 32 on a CPU, 64 to 256 on a GPU"
        )
        if stage.kind == "MapBatches" and stage.op.batch_size == 1:
            calls = f": {_n(rows, 'call')} for {_n(rows, 'row')}" if rows else ""
            yield Finding(
                "T3", stage.name, f"`batch_size=1`{calls}", change, {"batch_size": 1}, "plan"
            )
        elif stage.kind == "MapRows" and _is_class(stage) and _is_model(stage):
            yield Finding(
                "T3",
                stage.name,
                "`map` calls the model once per row"
                + (f": {_n(rows)} forward passes of one row" if rows else ""),
                "`map_batches` with a model that takes a batch; " + change,
                {"batch_size": 1, "rows": rows},
                "plan",
            )
        elif (
            stage.kind == "MapBatches"
            and stage.op.batch_size is None
            and _is_class(stage)
            and _is_model(stage)
            and rows
            and physical.tasks
            and not _sized_blocks(execution, stage)
        ):
            per_task = rows / physical.tasks
            row_bytes = _input_row_bytes(physical)
            # A block of a few images does no harm; one of many rows is what the model gets at once.
            if per_task > 32 or per_task * (row_bytes or 0) > 16 * _MIB:
                yield Finding(
                    "T3",
                    stage.name,
                    f"no `batch_size`: a batch is a whole block, here {_n(round(per_task))} "
                    "rows on "
                    "average",
                    change,
                    {"rows_per_batch": per_task},
                )


def _sized_blocks(execution: Execution, stage: Stage) -> bool:
    """Whether the user chose how large the blocks are: then a whole one is a decision."""
    return any(
        s.kind in ("StreamingRepartition", "Repartition") or (s.is_read and _users_blocks(s))
        for s in execution.before(stage)
    )


def t4(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            stages = [s for s in physical.stages if s.is_udf]
            last = _moved(physical)
            rows = physical.rows  # a shuffle that it is fused with does not count its own
            rows = rows or next((p.rows_in for p in last.outputs), None)
            if not stages or not rows:
                continue
            kept = execution.consumer == "materialize" and not physical.outputs
            following = case.after(execution, stages[-1]) if kept else []
            if not _next_is_udf(last) and not any(s.is_udf for s in following):
                continue
            images = any(_is_media(s) for s in execution.before(stages[-1]))
            if not images and not _uint8_in(physical) and not any(s.code.decodes for s in stages):
                continue
            for name, (kind, shape, ndim) in tensor_columns(physical.schema).items():
                floats = kind in ("float", "double", "halffloat", "float32", "float64")
                if not floats or ndim < 3 or (shape and _count(shape) < 3 * 32 * 32):
                    continue
                if name in tensor_columns(physical.inputs[0].schema if physical.inputs else None):
                    before = tensor_columns(physical.inputs[0].schema)[name][0]
                    if before == kind:
                        continue  # it came as floats
                bits = {"double": "float64", "float": "float32"}.get(kind, kind)
                mine = rows * _tensor_bytes(kind, shape) if shape else physical.bytes_out
                yield Finding(
                    "T4",
                    physical.name,
                    f"column {name!r} leaves as {bits}: {megabytes(mine)} for {_n(rows)} "
                    f"rows, and a pixel has one byte: {megabytes(mine / _WIDTH.get(kind, 1))} "
                    "as uint8",
                    "Ship uint8, and normalize in the model's actor after the transfer",
                    {"bytes_out": mine, "bytes_as_uint8": mine // _WIDTH.get(kind, 1)},
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
    return any(
        kind in ("uint8",) and ndim >= 3
        for p in physical.inputs
        for kind, _, ndim in tensor_columns(p.schema).values()
    )


def t5(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        physical = stage.physical
        if not (_is_class(stage) or _is_model(stage)) or not physical.rows:
            continue
        if physical.stages[-1] is not stage or not stage.code.known:
            continue
        if not (_is_model(stage) or _adds_column(stage)):
            continue
        later = execution.after(stage)
        source = _schema_into(stage)
        heavy = []
        for name, (kind, shape, _) in _pixels(physical.schema).items():
            size = _tensor_bytes(kind, shape) if shape else None
            heavy.append((name, size))
        row_bytes = _row_bytes(physical) or 0
        if not heavy and row_bytes >= 10_000:
            heavy = [(name, None) for name in _binary(physical.schema)]
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
                f"{megabytes(physical.bytes_out)} that leave it, for {_n(physical.rows)} rows",
                "Return only what somebody downstream reads: the key and the result",
                {"bytes_carried": carried, "bytes_out": physical.bytes_out, "rows": physical.rows},
            )
            break


def _adds_column(stage: Stage) -> bool:
    source = _schema_into(stage)
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
        if stage.kind == "Write" and "Image" in type(_sink(stage)).__name__:
            return True
    return False


def _sink(stage: Stage):
    return stage.op.datasink_or_legacy_datasource


def t6(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            if len(physical.outputs) != 1:
                continue
            following = physical.outputs[0]
            why = _accidental_split(physical, following)
            if not why:
                continue
            size = (
                f"; {megabytes(physical.bytes_out)} went from one to the other"
                if physical.rows
                else ""
            )
            yield Finding(
                "T6",
                f"{physical.name} | {following.name}",
                f"two operators instead of one: {why}{size}",
                "The same `num_cpus` (or none) on maps that belong together; a split should be a "
                "decision",
                {"bytes_between": physical.bytes_out},
                "plan",
            )


def _accidental_split(one: Physical, other: Physical) -> str:
    """Why two neighbors are not fused, when only a small difference keeps them apart."""
    if one.kind != "tasks" or other.kind != "tasks" or not one.stages or not other.stages:
        return ""
    last, first = one.stages[-1], other.stages[0]
    # The read of plain bytes or tables is not work for a CPU: another share for it is a decision.
    upstream_works = last.is_udf or (last.kind == "Filter" and last.fn is not None)
    if not upstream_works or not first.is_udf:
        return ""
    if last.kind in ("Filter", "FlatMap") and getattr(first.op, "batch_size", None) is not None:
        return ""  # Ray Data never fuses these
    a, b = _remote(one), _remote(other)
    different = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    if different == {"num_cpus"}:
        if max(one.cpus, other.cpus) > 1:
            return ""  # more than one CPU is asked for on purpose: threads
        return f"`num_cpus` is {one.cpus:g} here and {other.cpus:g} there"
    limits = [s.op.compute.size for s in (last, first) if hasattr(s.op.compute, "size")]
    if not different and len(set(limits)) == 2:
        return ""  # a limit on how many run at once is deliberate
    return ""


def _remote(physical: Physical) -> dict:
    kept = dict(physical.remote)
    for name in ("scheduling_strategy", "_generator_backpressure_num_objects", "_labels"):
        kept.pop(name, None)
    return {k: float(v) if k in ("num_cpus", "num_gpus") else str(v) for k, v in kept.items() if v}


def t7(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            if physical.kind != "actors" or physical.gpus or _limited(execution):
                continue
            model = next((s for s in physical.stages if _is_class(s)), None)
            if model is None:
                continue
            inside = physical.stages[: physical.stages.index(model)]
            work = [s for s in inside if s.is_udf or _is_images(s)]
            media = any(_is_media(s) for s in execution.before(model))
            heavy = any(
                _is_images(s) or s.code.decodes or s.code.resizes for s in work if s.fn or s.is_read
            )
            if not work or not (heavy or (media and any(s.is_udf for s in work))):
                continue  # light work is well placed there
            largest = physical.pool[1] if physical.pool else 1
            if physical.has_run and largest == float("inf"):
                largest = max(physical.actors, 1)
            held = largest * max(physical.per_actor[0], 0)
            # All cores busy with actors: then there is nobody left to overlap with.
            if held > execution.cpus - 1 + 1e-6:
                continue
            names = " and ".join(s.name for s in work)
            yield Finding(
                "T7",
                physical.name,
                f"{names} runs inside the model's actors, one after the other: they hold "
                f"{held:g} of {_n(execution.cpus, 'CPU')}, the others cannot help",
                "Another `num_cpus` for the actor than for the map (0.99 is enough): then tasks "
                "prepare the next batch meanwhile",
                {"cpus_of_actors": held, "cpus": execution.cpus},
                "plan",
            )


def t8(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        if stage.kind != "MapBatches" or stage.op.batch_format != "pandas":
            continue
        tensors = tensor_columns(_schema_into(stage))
        if not tensors:
            position = stage.physical.stages.index(stage)
            before = stage.physical.stages[position - 1] if position else None
            inputs = [p.schema for p in stage.physical.inputs]
            if before is not None and _is_images(before):
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
        steps = stage.code.conversions() + doctor_code.composed(stage.fn)
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
        floor = _MIB if not _is_class(stage) else 8 * _MIB  # an actor loads it once
        large = [(name, size) for name, size in doctor_code.captured(stage.fn) if size >= floor]
        if large:
            name, size = large[0]
            yield Finding(
                "T10",
                stage.name,
                f"the function carries {name!r} with {megabytes(size)} along"
                + (f", for {_n(stage.physical.tasks, 'task')}" if stage.physical.tasks else ""),
                "Build or load it in `__init__` of a class, or `ray.put` it once and pass the "
                "reference",
                {"bytes": size, "name": name},
                "code",
            )


def t11(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        if not stage.is_udf:
            continue
        autograd, double = stage.code.autograd(), stage.code.float64()
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


# ---- resources ----------------------------------------------------------------------------------


def r1(case: Case) -> Iterator[Finding]:
    for execution in _full(case):
        for physical in execution.operators:
            if not any(s.is_udf for s in physical.stages) or physical.gpus:
                continue
            one = physical.pool[1] == 1 if physical.pool else physical.task_limit == 1
            if not one or execution.cpus < 2:
                continue
            held = physical.per_actor[0] if physical.pool else physical.cpus
            others = sum(p.busy_s for p in execution.operators if p is not physical)
            # Actors take time to start; when the first was there is known to half a second.
            seconds = max(execution.seconds - (physical.ready_s or 0), physical.busy_s)
            idle = execution.cpus * seconds - physical.busy_s - others
            # It has to be what everybody waits for, for seconds, while most cores do nothing. (One
            # of two cores can be idle at most; then the other steps must be next to nothing.)
            few = execution.cpus < 4
            if (
                held <= execution.cpus / (2 if few else 3)
                and physical.busy_s >= max(3, 0.6 * seconds)
                and idle >= (0.4 if few else 0.5) * execution.cpus * seconds
                and not (few and any(s.code.threads_itself() for s in physical.stages if s.is_udf))
            ):
                yield Finding(
                    "R1",
                    physical.name,
                    f"one worker was busy for {physical.busy_s:.0f} of {seconds:.0f} s, "
                    f"{_n(execution.cpus, 'CPU')} were there and mostly idle",
                    "More replicas (`ActorPoolStrategy(size=...)`), or more CPUs for the one",
                    {
                        "busy_s": physical.busy_s,
                        "seconds": seconds,
                        "cpus": execution.cpus,
                    },
                )


def r2(case: Case) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    for execution, stage in case.each():
        physical = stage.physical
        if not stage.is_udf or physical.gpus:
            continue
        cpus = physical.per_actor[0] if physical.pool else (physical.cpus or 1)
        threads = stage.code.torch_threads(cores, doctor_code.constructor_arguments(stage.op))
        how = "`torch.set_num_threads`"
        if threads is None:
            variables = (physical.remote.get("runtime_env") or {}).get("env_vars", {})
            text = str(variables.get("OMP_NUM_THREADS", ""))
            threads, how = (int(text), "`OMP_NUM_THREADS`") if text.isdigit() else (None, "")
        if threads is None:
            continue
        workers = 1
        if physical.pool:
            workers = min(physical.pool[1], max(physical.actors, physical.pool[0], 1))
        elif physical.kind == "tasks":
            workers = max(1, execution.cpus // max(cpus, 0.1))
        together = threads * workers
        if threads > max(1, cpus) and together > execution.cpus:
            yield Finding(
                "R2",
                stage.name,
                f"{how} gives {threads} threads to a worker with {cpus:g} CPUs; "
                f"{_n(workers, 'worker')}: "
                f"{_n(together)} threads on {_n(execution.cpus, 'CPU')}",
                "As many threads as `num_cpus`: Ray sets it so by itself when nobody else does",
                {"threads": threads, "num_cpus": cpus, "workers": workers, "cpus": execution.cpus},
                "code",
            )
        elif threads == 1 and cpus >= 2:
            yield Finding(
                "R2",
                stage.name,
                f"the worker holds {cpus:g} CPUs and {how} allows it one thread",
                "Threads equal to `num_cpus`, or more workers with one CPU each",
                {"threads": threads, "num_cpus": cpus},
                "code",
            )


def r3(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            if physical.gpus > 0 and execution.gpus == 0 and execution.local:
                yield Finding(
                    "R3",
                    physical.name,
                    f"`num_gpus={physical.gpus:g}`, and Ray has no GPU here: it waits, without "
                    "an error, "
                    "for half an hour",
                    "`num_gpus` only if `ray.cluster_resources()` lists a GPU",
                    {"num_gpus": physical.gpus, "gpus": execution.gpus},
                    "plan",
                )


def r4(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        held, need, names = _held_cpus(execution)
        if execution.local and names and need and held + need > execution.cpus + 1e-6:
            yield Finding(
                "R4",
                " and ".join(names),
                f"the actors hold {held:g} of {_n(execution.cpus, 'CPU')}, and the tasks that "
                "feed them "
                f"need {need:g}",
                "Leave at least one CPU free of actors",
                {"cpus_of_actors": held, "cpus_of_tasks": need, "cpus": execution.cpus},
                "plan",
            )


def _startable(physical: Physical, execution: Execution) -> float:
    """Actors of the smallest pool that can start; a GPU lets only so many."""
    if not physical.gpus:
        return physical.pool[0]
    share = physical.gpus
    fit = execution.gpus // share if share >= 1 else execution.gpus * int(1 / share + 1e-6)
    return min(physical.pool[0], fit)


def _held_cpus(execution: Execution) -> tuple[float, float, list[str]]:
    """CPUs of the smallest pools, the CPUs that the smallest task in front of them needs."""
    actors = [p for p in execution.operators if p.kind == "actors" and p.per_actor[0] > 0]
    held = sum(_startable(p, execution) * p.per_actor[0] for p in actors)
    needs = []
    for physical in actors:
        upstream, queue = [], list(physical.inputs)
        while queue:
            one = queue.pop()
            upstream.append(one)
            queue += one.inputs
        needs += [p.cpus for p in upstream if p.kind == "tasks" and p.cpus > 0]
    return held, max(needs, default=0), [p.name for p in actors]


def cannot_start(execution: Execution) -> str:
    """Why this plan can never go on here; empty when it can."""
    if not execution.local:
        return ""  # a cluster may grow
    for physical in execution.operators:
        if physical.gpus > execution.gpus:
            return (
                f"{physical.name} waits for {_n(physical.gpus, 'GPU')}, and Ray has "
                f"{_n(execution.gpus)}."
            )
        need = max(physical.cpus, physical.per_actor[0])
        if need > execution.cpus:
            return f"{physical.name} waits for {_n(need, 'CPU')}, and Ray has {_n(execution.cpus)}."
    held, need, names = _held_cpus(execution)
    if names and need and held + need > execution.cpus + 1e-6:
        total = _n(execution.cpus, "CPU")
        return f"{' and '.join(names)} hold {held:g} of {total}; tasks need {need:g}."
    return ""


def r5(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if _gpus(stage) <= 0:
            continue
        if stage.is_read:
            what = "a read"
        elif stage.is_udf and stage.code.known and not stage.code.uses_accelerator_library:
            # A stand-in for a model may have no library either: only decoding and resizing count.
            if _is_class(stage) and stage.code.looks_like_model:
                continue
            others = [s for s in execution.stages if s is not stage and _gpus(s) > 0]
            if stage.code.decodes or stage.code.resizes or "Image" in stage.code.text:
                what = "a function that decodes or resizes on the CPU"
            elif any(_answers(s) for s in others) and not _named_like_a_model(stage):
                what = "a function that prepares for the model, or comes after it"
            else:
                continue
        else:
            continue
        yield Finding(
            "R5",
            stage.name,
            f"`num_gpus={_gpus(stage):g}` on {what}: no library in its code can use a GPU",
            "`num_gpus` only on the step that runs the model",
            {"num_gpus": _gpus(stage)},
            "code",
        )


def r6(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        for physical in execution.operators:
            share = physical.gpus
            if not share or not execution.gpus or not physical.pool:
                continue
            smallest, largest = physical.pool
            if smallest * share > execution.gpus + 1e-6 and execution.local:
                yield Finding(
                    "R6",
                    physical.name,
                    f"{_n(smallest)} replicas with `num_gpus={share:g}` need "
                    f"{smallest * share:g} GPUs; "
                    f"there are {execution.gpus:g}",
                    "As many replicas as GPUs, or fractions that fit",
                    {"replicas": smallest, "num_gpus": share, "gpus": execution.gpus},
                    "plan",
                )
            elif share < 1 and largest > 1:
                fit = int(1 / share + 1e-6)
                if fit * share < 0.75:  # a quarter or more of each GPU can never be used
                    yield Finding(
                        "R6",
                        physical.name,
                        f"`num_gpus={share:g}`: {_n(fit, 'replica')} per GPU, and "
                        f"{1 - fit * share:.0%} of "
                        "each GPU stays unused",
                        "A fraction that divides 1: 0.5, 0.33, 0.25",
                        {"num_gpus": share, "replicas_per_gpu": fit},
                        "plan",
                    )


def r7(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        size = getattr(stage.op, "batch_size", None)
        if stage.kind != "MapBatches" or not isinstance(size, int) or size < 128:
            continue
        physical = stage.physical
        if not physical.inputs or physical.stages[0] is not stage:
            continue
        images = _pixels(_schema_into(stage)).values()
        for_cpu = images and _answers(stage) and not _gpus(stage)
        if size < 256 and not for_cpu:
            continue
        row, rows = _input_row_bytes(physical), _rows_into(stage)
        size = min(size, rows or size)
        # A model turns each byte of a pixel into a float of four, and makes larger things of it.
        floats = 4 if for_cpu and any(kind == "uint8" for kind, _, _ in images) else 1
        floor = (64 if for_cpu else 256 if _gpus(stage) else 128) * _MIB
        # Ray's advice is 16 MiB per batch on a CPU; several times that is a mistake, not a taste.
        if row and row * size * floats >= floor:
            what = ", as the floats that the model gets" if floats == 4 else ""
            yield Finding(
                "R7",
                stage.name,
                f"batches of {size} rows with {megabytes(row)} each: "
                f"{megabytes(row * size * floats)} for one batch{what} "
                "in each worker, before the model has computed anything",
                "A batch of some 16 MB on a CPU; on a GPU what its memory holds with the "
                "activations",
                {"batch_size": size, "bytes_per_row": row, "bytes_per_batch": row * size * floats},
            )


def r8(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if execution.spilled >= _MIB:
            heaviest = max(execution.operators, key=lambda p: p.bytes_out or 0)
            yield Finding(
                "R8",
                heaviest.name,
                f"{megabytes(execution.spilled)} were written to disk, as the object store was "
                "full; this "
                f"operator put {megabytes(heaviest.bytes_out or 0)} into it",
                "Ship less (uint8, encoded bytes), stream instead of `materialize` and all-to-all, "
                "smaller blocks",
                {"spilled_bytes": execution.spilled},
            )


def r9(case: Case) -> Iterator[Finding]:
    for execution in _full(case):
        for physical in execution.operators:
            if physical.kind != "actors" or not physical.has_run or not physical.pool:
                continue
            if execution.error:
                continue
            smallest = physical.pool[0]
            what = f"{smallest} actors were started and there were {_n(physical.tasks, 'task')}"
            numbers = {"actors": smallest, "tasks": physical.tasks}
            # Two actors for one block happen in any small run; a quarter of four or more do not.
            if smallest >= 4 and physical.tasks <= 0.75 * smallest:
                yield Finding(
                    "R9",
                    physical.name,
                    f"{what}: {smallest - physical.tasks} never got work",
                    "A pool that grows: `ActorPoolStrategy(min_size=1, max_size=...)`; or more "
                    "blocks",
                    numbers,
                )
            # Models that share cores compute no faster, and each has to start and to load first.
            elif (
                smallest > 2 * execution.cpus
                and not physical.gpus
                and physical.tasks <= 4 * smallest
                and any(_answers(s) and s.code.uses_accelerator_library for s in physical.stages)
            ):
                yield Finding(
                    "R9",
                    physical.name,
                    f"{what}, on {_n(execution.cpus, 'CPU')}: each of them starts and loads the "
                    f"model, and answers {_n(round(physical.tasks / smallest, 1), 'task')}",
                    "One single-threaded actor for each core, `ActorPoolStrategy(size=...)` from "
                    "`ray.cluster_resources()`",
                    numbers | {"cpus": execution.cpus},
                )


def r10(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        stages = execution.stages
        if _limited(execution):
            continue
        for stage in stages:
            models = [s for s in case.after(execution, stage) if _answers(s)]
            if stage.kind in ("RandomShuffle", "Sort") and models:
                size = stage.physical.bytes_out
                yield Finding(
                    "R10",
                    stage.name,
                    f"all rows are moved before `{models[0].name}` may start, and it answers "
                    "them one by "
                    "one" + (f" ({megabytes(size)})" if size else ""),
                    "No order before inference; keep a key, and sort the small result if it "
                    "has to be",
                    {"bytes": size},
                    "plan",
                )
            # Without a model: pixels moved for an order, and a later step makes them small.
            moved = sum(p.bytes_out or 0 for p in stage.physical.inputs)
            moved = max(moved, (stage.physical.rows or 0) * (_input_row_bytes(stage.physical) or 0))
            pixels = _pixels(_schema_into(stage))
            users = [s for s in case.after(execution, stage) if s.is_udf]
            if stage.kind == "Sort" and not models and pixels and users and moved >= 1e6:
                yield Finding(
                    "R10",
                    stage.name,
                    f"{megabytes(moved)} of pixels are moved for an order, and "
                    f"`{users[0].name}` may only start afterwards",
                    "Compute first, keep a key, and sort the small result if it has to be",
                    {"bytes": moved},
                    "plan",
                )
        if (
            execution.preserve_order
            and (execution.write is not None or execution.consumer in ("count", "materialize"))
            and any(s.is_udf for s in stages)
            and not any(s.kind in ("Sort", "Zip", "Limit") for s in stages)
        ):
            yield Finding(
                "R10",
                stages[-1].name,
                "`preserve_order=True`, and the result goes to files, which have no order: a "
                "slow block "
                "holds up all that are ready",
                "`execution_options.preserve_order = False` (the default), and a key in each row",
                {},
                "plan",
            )


def r11(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not execution.gpus or any(p.gpus for p in execution.operators):
            continue
        for stage in execution.stages:
            if _is_class(stage) and "torch" in stage.code.text and stage.code.model_built_in_init:
                yield Finding(
                    "R11",
                    stage.name,
                    f"Ray has {_n(execution.gpus, 'GPU')}, and no step of the pipeline asks for "
                    "one",
                    "`num_gpus=1` on the step that runs the model, where there is a GPU",
                    {"gpus": execution.gpus},
                    "plan",
                )


# ---- output -------------------------------------------------------------------------------------


def _data_files(execution: Execution) -> dict[str, int]:
    return {
        name: size
        for name, size in (execution.written or {}).items()
        if not Path(name).name.startswith(("_", "."))
    }


def _table_sink(execution: Execution) -> str:
    """ "Parquet", "CSV" or "JSON"; empty for images, numpy and databases."""
    if execution.write is None:
        return ""
    kind = type(_sink(execution.write)).__name__.removesuffix("Datasink")
    return kind if kind in ("Parquet", "CSV", "JSON") else ""


def o1(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        files = _data_files(execution)
        if not _table_sink(execution) or getattr(_sink(execution.write), "partition_cols", None):
            continue
        # Ray Data's own choice for a small input is two blocks per CPU, for each of the inputs.
        inputs = sum(not s.op.input_dependencies for s in execution.stages)
        few = max(24, 3 * execution.cpus * max(1, inputs))
        mean = sum(files.values()) / len(files) if files else 0
        if len(files) > few and mean < _MIB:
            yield Finding(
                "O1",
                execution.write.name,
                f"{len(files)} files with {megabytes(mean)} each on average, "
                f"{megabytes(sum(files.values()))} "
                "in all",
                "`min_rows_per_file=` in the write (no shuffle)",
                {"files": len(files), "mean_bytes": mean},
            )


def o2(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        write = execution.write
        if write is None or not _table_sink(execution):
            continue
        before = execution.before(write)
        last = before[-1] if before else None
        one = last is not None and last.kind == "Repartition" and last.op.num_outputs == 1
        summary = any(s.kind in ("Aggregate", "Limit") for s in before)
        work = [s for s in before if s.is_udf or _is_images(s)]
        blocks = max((p.blocks or 0 for p in (last.physical.inputs if last else [])), default=0)
        files = _data_files(execution)
        size = sum(files.values())
        # A small table may well be one file.
        if one and not summary and work and blocks != 1 and size >= 1e6:
            yield Finding(
                "O2",
                write.name,
                f"`repartition(1)` collects {_n(blocks)} blocks in one task before anything is "
                "written" + (f": one file of {megabytes(size)}" if files else ""),
                "No repartition; `min_rows_per_file=` in the write makes few files while it "
                "streams",
                {"blocks": blocks, "files": len(files), "bytes": size},
            )
        elif len(files) == 1 and sum(files.values()) > 1e9:
            yield Finding(
                "O2",
                write.name,
                f"one file of {megabytes(sum(files.values()))}: one worker writes, one will read",
                "Files of about 128 MB to 1 GB: `max_rows_per_file=`",
                {"files": 1, "bytes": sum(files.values())},
            )


def o3(case: Case) -> Iterator[Finding]:
    for call in case.calls:
        if call.name not in ("take_all", "to_pandas") or not call.rows or not call.executions:
            continue
        writer = next((w for w, rows in case.collected if rows == call.rows), None)
        execution = call.executions[-1]
        if any(s.kind in ("Aggregate", "Limit") for s in execution.stages):
            continue  # a summary is small, whatever the data
        if call.rows < 16 or not any(s.is_udf for s in execution.stages):
            continue
        if call.name == "to_pandas" and _is_small_table(call, execution):
            writer = None
        if writer:
            then = f"{writer} wrote them there"
            change = "`write_parquet` from the workers: no row passes through the driver"
        elif again := _written_again(case, execution):
            then = f"`{again.consumer}` ran the model a second time to write them"
            change = "`write_parquet` once, then read back the columns that you want to see"
        else:
            continue
        yield Finding(
            "O3",
            execution.operators[-1].name,
            f"`{call.name}()` brought {_n(call.rows, 'row')} "
            f"({megabytes(_collected_bytes(call))}) into the driver, and {then}",
            change,
            {"rows": call.rows, "bytes": _collected_bytes(call)},
        )


def _is_small_table(call, execution: Execution) -> bool:
    """Below 1 MB and no arrays in it: for such a table of labels the driver is a fine place."""
    schema = execution.operators[-1].schema
    if schema is None or tensor_columns(schema) or _collected_bytes(call) >= 1e6:
        return False
    return not any(re.match(r"(large_|fixed_size_)?list", str(kind)) for kind in schema.types)


def _written_again(case: Case, collected: Execution) -> Execution | None:
    """The execution that wrote the same answers, for which a model ran again."""
    models = {s.signature for s in collected.stages if _answers(s)}
    for other in _full(case):
        if other is not collected and not other.error and _table_sink(other):
            again = models & {s.signature for s in other.stages}
            if again and _same_end(collected, other):
                return other
    return None


def o4(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        kind = _table_sink(execution)
        if kind not in ("CSV", "JSON"):
            continue
        physical = execution.write.physical
        schema = (
            physical.inputs[0].schema if len(physical.stages) == 1 and physical.inputs else None
        )
        arrays = {k: v[1] for k, v in tensor_columns(schema).items()}
        numbers = _numbers_in_text(_data_files(execution))
        size = sum(_data_files(execution).values())
        # A handful of scores per row is a table; 16 numbers or more are an array.
        large = {k: s for k, s in arrays.items() if s is None or _count(s) >= 16}
        if large or numbers >= 16:
            what = (
                f"column {next(iter(large))!r}"
                if large
                else f"an array of {numbers} numbers per row"
            )
            yield Finding(
                "O4",
                execution.write.name,
                f"{what} is written as text by `{execution.consumer}`"
                + (f": {megabytes(size)} in all" if size else ""),
                "`write_parquet`: arrays stay arrays, a fraction of the bytes, and nothing to "
                "parse",
                {"numbers_per_row": numbers, "bytes": size},
            )


def _numbers_in_text(files: dict[str, int]) -> int:
    """The most numbers in one list, or in one field, at the beginning of a text file."""
    for name in files:
        with contextlib.suppress(OSError):
            with open(name, encoding="utf-8", errors="replace") as file:
                head = re.sub(r"np\.\w+\(([^()]*)\)", r"\1", file.read(20_000))
            lists = re.findall(r"\[[\s\d.,eE+\-\[]{16,}", head)
            # Joined with blanks or semicolons: one field as well.
            lists += re.findall(r"(?:-?\d[\d.eE+\-]*[ ;|]+){15,}-?\d", head)
            return max((len(re.findall(r"\d[\d.eE+\-]*", text)) for text in lists), default=0)
    return 0


def o5(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not _table_sink(execution):
            continue
        write, physical = execution.write, execution.write.physical
        models = [s for s in case.before(execution, write) if _answers(s)]
        if not models:
            continue  # storing prepared images is a job of its own
        files = [f for f in _data_files(execution) if f.endswith(".parquet")]
        schema, sizes = None, {}
        if len(physical.stages) == 1 and physical.inputs:
            schema = physical.inputs[0].schema
        with contextlib.suppress(Exception):
            import pyarrow.parquet as pq

            schema = schema or (pq.read_schema(files[0]) if files else None)
            for file in files[:64]:
                footer = pq.read_metadata(file)
                for g in range(footer.num_row_groups):
                    for c in range(footer.row_group(g).num_columns):
                        chunk = footer.row_group(g).column(c)
                        name = chunk.path_in_schema.split(".")[0]
                        sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
        heavy = [*_pixels(schema), *_binary(schema), *_unread(case, execution, schema)]
        total = sum(sizes.values()) or sum(_data_files(execution).values())
        mine = sum(sizes.get(name, 0) for name in heavy) if sizes else total
        makers = [s for s in models if _is_class(s) or _named_like_a_model(s)]
        produced = [n for n in heavy if any(s.code.changes_column(n) for s in makers)]
        # Few kilobytes, or a small part of the files, are no reason to change anything.
        if heavy and not produced and mine >= 100_000 and mine >= 0.5 * total:
            heavy.sort(key=lambda name: -sizes.get(name, 0))
            yield Finding(
                "O5",
                write.name,
                f"column {heavy[0]!r} is written beside the results: {megabytes(mine)} of "
                f"{megabytes(total)}",
                "`select_columns([...])`, or return only the key and the result from the model",
                {"bytes": mine, "bytes_written": total},
            )


def _unread(case: Case, execution: Execution, schema) -> list[str]:
    """Columns of text or lists that come from the source, and that no code on the way names; and
    arrays with 256 numbers or more that the model got and passes on."""
    before = case.before(execution, execution.write)
    codes = [s.code for s in before if s.is_udf]
    if not codes or not all(code.known for code in codes):
        return []
    named = set().union(*(code.strings for code in codes))
    source = set()
    for stage in before:
        if stage.kind == "ReadFiles":
            source |= set(getattr(stage.op.scanner.schema, "names", ()))
    found = []
    for name, kind in zip(getattr(schema, "names", ()), getattr(schema, "types", ()), strict=False):
        if name in source - named and re.match(r"(large_)?(string|list)", str(kind)):
            found.append(name)
    models = [s for s in before if _answers(s)]
    given = tensor_columns(_schema_into(models[-1])) if models else {}
    for name, (_, shape, _) in tensor_columns(schema).items():
        if name in given and shape and given[name][1] == shape and _count(shape) >= 256:
            found.append(name)
    return found


def o6(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        columns = (
            getattr(_sink(execution.write), "partition_cols", None) if execution.write else None
        )
        files = _data_files(execution)
        if not columns or not files:
            continue
        folders = {str(Path(f).parent) for f in files}
        rows = parquet_rows(files)
        # Ten rows per folder or fewer, or hundreds of tiny files: opening costs more than reading.
        tiny = len(folders) >= 100 and sum(files.values()) / len(files) < 32 * _KIB
        if len(folders) >= 16 and rows and (rows / len(folders) <= 10 or tiny):
            yield Finding(
                "O6",
                execution.write.name,
                f"`partition_cols={list(columns)}`: {len(folders)} folders and {len(files)} "
                "files for "
                f"{_n(rows, 'row')}",
                "Partition by something with few values (a day, a class), or not at all",
                {"folders": len(folders), "files": len(files), "rows": rows},
            )


def o7(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not _table_sink(execution) or not execution.existing or not execution.written:
            continue
        mode = str(getattr(_sink(execution.write), "mode", "")).lower()
        asked = "mode" in (execution.call.keywords if execution.call else {})
        if asked or not mode.endswith("append"):
            continue
        suffix = Path(next(iter(execution.written))).suffix
        old = [f for f in execution.existing if f.endswith(suffix)]
        new = list(_data_files(execution))
        before, now = _lines_or_rows(old, suffix), _lines_or_rows(new, suffix)
        # Other rows may be appended on purpose. As many again, once or more, are the same ones; and
        # so are those of files that this script has read for the same folder before.
        again = _same_files_again(case, execution)
        trial = _trial_before(case, execution)
        same = before and now and before % now == 0 and not _other_source(case, execution)
        if before and now and (again or trial or same):
            yield Finding(
                "O7",
                execution.write.name,
                f"the folder had {_n(before, 'row')} in {_n(len(old), 'file')} and got "
                f"{_n(now)} more"
                + (f", and {again} of the files read were read for it before" if again else "")
                + (", the first from a trial with `limit` of the same work" if trial else "")
                + ": the default mode appends",
                '`mode="overwrite"`, or a new folder for each run',
                {"rows_before": before, "rows_written": now},
            )


def _written_here_before(case: Case, execution: Execution) -> Iterator[Execution]:
    """Earlier executions of this script that wrote into the same folder."""
    for other in case.executions:
        if other is execution:
            return
        if set(other.written or {}) & set(execution.existing or {}):
            yield other


def _other_source(case: Case, execution: Execution) -> bool:
    """Whether this script itself wrote something else into that folder before."""

    def last(one):
        return one.stages[-2].signature if len(one.stages) > 1 else None

    mine = last(execution)
    return any(last(other) != mine for other in _written_here_before(case, execution))


def _files_read(stage: Stage) -> list[str]:
    if stage.kind == "ReadFiles":
        return _parquet_files(_listing(stage).paths)
    return paths_of(stage.op.datasource)


def _way(execution: Execution) -> list:
    return [operation(s.op) for s in execution.stages if s.is_udf or s.kind == "Filter"]


def _all_files_read(execution: Execution) -> set[str]:
    return {file for stage in execution.stages if stage.is_read for file in _files_read(stage)}


def _same_files_again(case: Case, execution: Execution) -> int:
    """How many files went the same way into the same folder before, among others."""
    mine, again = _all_files_read(execution), 0
    for other in _written_here_before(case, execution):
        theirs = _all_files_read(other)
        if theirs != mine and _way(other) == _way(execution):
            again = max(again, len(theirs & mine))
    return again


def _trial_before(case: Case, execution: Execution) -> bool:
    """Whether the same work on the same files wrote its first rows into the same folder before."""
    limited = any(s.kind == "Limit" for s in execution.stages)
    return not limited and any(
        any(s.kind == "Limit" for s in other.stages)
        and _way(other) == _way(execution)
        and _all_files_read(other) == _all_files_read(execution)
        for other in _written_here_before(case, execution)
    )


def _lines_or_rows(files: list[str], suffix: str) -> int | None:
    if suffix == ".parquet":
        return parquet_rows(files)
    total = 0
    for name in files[:1000]:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            total += sum(1 for _ in file) - (1 if suffix == ".csv" else 0)
    return total


def o8(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        write = execution.write
        if write is None:
            continue
        before = case.before(execution, write)
        models = [s for s in before if _answers(s)]
        if not models:
            continue  # shuffling or sorting may be the very purpose of a job without a model
        for stage in before[before.index(models[-1]) + 1 :]:
            why = ""
            if stage.kind == "RandomShuffle":
                why = "a random order of results helps nobody"
            elif stage.kind == "Repartition" and getattr(stage.op, "shuffle", False):
                why = "`repartition(shuffle=True)` moves every row"
            elif stage.kind == "Sort" and _sorts_by_key(stage):
                why = "files have no order that a reader could rely on"
            if why:
                size = stage.physical.bytes_out or sum(
                    p.bytes_out or 0 for p in stage.physical.inputs
                )
                yield Finding(
                    "O8",
                    stage.name,
                    f"all-to-all before the write, {why}"
                    + (f"; {megabytes(size)} wait for the last row" if size else ""),
                    "Write as the results come; `min_rows_per_file=` for few files",
                    {"bytes": size},
                    "plan",
                )


def _sorts_by_key(stage: Stage) -> bool:
    """By where a row comes from; sorting by a score may be the purpose."""
    names = [str(c) for c in getattr(stage.op.sort_key, "_columns", [])]
    return bool(names) and all(re.search(r"path|id$|name|uri|url|file|key", n) for n in names)


# ---- production ---------------------------------------------------------------------------------


def p1(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if execution.errored_blocks:
            yield Finding(
                "P1",
                execution.stages[-1].name if execution.stages else "plan",
                f"{_n(execution.errored_blocks, 'block')} failed and were dropped whole "
                "(`max_errored_blocks`): good rows went with the bad ones",
                "Decode defensively in the function, mark the bad row, and count them",
                {"errored_blocks": execution.errored_blocks},
            )


RULES = {
    "I1": Rule("files read and rows that a filter on their path keeps", i1),
    "I2": Rule("bytes leaving a read that decodes, against the files' bytes", i2),
    "I3": Rule("the read's arguments; shapes in its output", i3),
    "I4": Rule("columns used in the code, bytes in the footers", i4),
    "I5": Rule("number and mean size of the files; how often they are read", i5),
    "I6": Rule("blocks that were asked for; rows and bytes in each", i6),
    "I7": Rule("tasks of the operator behind a single block", i7),
    "I8": Rule("readers of a materialized dataset; collected bytes", i8),
    "I9": Rule("steps that ran in more than one execution", i9),
    "I10": Rule("`num_cpus` of the read", i10),
    "I11": Rule("handlers in the code that make up a row", i11),
    "T1": Rule("calls of row functions; loops in their code", t1),
    "T2": Rule("constructors in the code that is called", t2),
    "T3": Rule("`batch_size`; rows per task", t3),
    "T4": Rule("type of the tensors between operators", t4),
    "T5": Rule("columns and bytes that leave the model", t5),
    "T6": Rule("`num_cpus` of neighbors that are not fused", t6),
    "T7": Rule("steps fused into a pool; CPUs it leaves", t7),
    "T8": Rule("`batch_format`; tensors in the input", t8),
    "T9": Rule("conversions in the code of one function", t9),
    "T10": Rule("bytes of what the function refers to", t10),
    "T11": Rule("the class's code: inference mode, double precision", t11),
    "R1": Rule("busy time of a pool of one, against idle CPUs", r1),
    "R2": Rule("threads set in the code, against `num_cpus`", r2),
    "R3": Rule("`num_gpus`, against the cluster's resources", r3),
    "R4": Rule("CPUs of the pools, against what the tasks need", r4),
    "R5": Rule("`num_gpus` on reads and on code without a GPU library", r5),
    "R6": Rule("pool sizes and fractions, against the GPUs", r6),
    "R7": Rule("`batch_size` times the bytes of a row", r7),
    "R8": Rule("bytes that the object store wrote to disk", r8),
    "R9": Rule("actors that got no task, or share a core for a few", r9),
    "R10": Rule("shuffles and sorts before a model; `preserve_order`", r10),
    "R11": Rule("a GPU in the cluster that no step asks for", r11),
    "O1": Rule("number and size of the files of a write", o1),
    "O2": Rule("`repartition(1)` before a write", o2),
    "O3": Rule("rows collected and rows written", o3),
    "O4": Rule("arrays in the written columns or files", o4),
    "O5": Rule("bytes of pixel columns in the written files", o5),
    "O6": Rule("folders and rows of the write", o6),
    "O7": Rule("rows that were there before, and rows written", o7),
    "O8": Rule("all-to-all steps between model and write", o8),
    "P1": Rule(
        "blocks that failed and were dropped", p1, "One bad image takes its neighbors along"
    ),
    "P2": Rule(
        "handlers in a model's code that make up a row", p2, "Made-up rows from a bare `except`"
    ),
}

CANNOT_SEE = {
    "T12": "wrong preprocessing looks like any other; only a reference answer tells",
    "R12": "whether a GPU starves shows in its utilization over time, not in plan or counters",
    "P3": "a short job without checkpoint is no mistake, and nobody knows how long yours will run",
    "P4": "names, progress and timeouts are matters of operation",
    "P5": "leaks show between runs; the doctor sees one",
    "P6": "retries of storage errors show only when the storage fails",
}
