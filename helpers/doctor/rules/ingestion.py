"""I: how images and tables are read."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator

import pyarrow.fs

from helpers.doctor import functions
from helpers.doctor.execution import Execution, Physical, Stage
from helpers.doctor.plan import columns_of, listing, parquet_files, paths_of
from helpers.doctor.report import Finding
from helpers.doctor.rules.case import (
    KIB,
    MIB,
    Case,
    accidental_split,
    amount,
    collected_bytes,
    full_executions,
    gives_answers,
    input_row_bytes,
    is_class,
    is_images,
    is_media,
    is_model,
    next_is_udf,
    only_a_look,
    pixel_columns,
    remote_arguments,
    rows_into,
    same_end,
    swallowed,
    tensor_columns,
    users_blocks,
)
from helpers.plots import megabytes


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
        reads = [s for s in before if s.kind == "Read" and is_media(s)]
        if len(reads) != 1:
            continue
        if stage.fn is not None:
            used = stage.code.columns_used()
        else:
            used = columns_of(stage.op.predicate_expr)
        if (
            not used
            or not used <= from_path
            or any(is_model(s) and not _only_passed_on(used, s) for s in before)
            or stage.physical.rows is None
            or only_a_look(execution)
        ):
            continue
        files = len(paths_of(reads[0].op.datasource))
        kept = stage.physical.rows
        if files >= 8 and kept <= files / 2 and stage.physical.kind == "tasks":
            yield Finding(
                "I1",
                stage.name,
                f"{files} files were read and decoded, {kept} rows were kept; the filter only "
                f"looks at {', '.join(sorted(used))}",
                "Choose before reading: a list of paths or folders, `partition_filter=`, or "
                "`file_extensions=` of the read",
                {"files_read": files, "rows_kept": kept},
            )


def _only_passed_on(columns: set[str], model: Stage) -> bool:
    """Whether a model's answer has columns of its input as they were: they are no answers of it."""
    used = model.code.columns_used() or set()
    return columns <= used and not any(model.code.changes_column(c) for c in columns)


def i2(case: Case) -> Iterator[Finding]:
    """Pixels leave the read; somebody makes them small only afterwards."""
    for execution, stage in case.each():
        read = stage.physical
        if not is_images(stage) or not read.rows:
            continue
        if not _leaves_read(stage) or _own_cpus(stage) not in (None, 1):
            continue  # fused with what follows, or I10
        following = [s for s in execution.after(stage) if s.is_udf and s.physical is not read][:2]
        if not read.outputs or not following:
            continue
        # Made smaller by name, or in effect: a function leaves hardly anything of the pixels. (What
        # a model in an actor gets has to cross the store.)
        left = following[0].physical.bytes_out
        gone = left is not None and read.bytes_out and left <= 0.1 * read.bytes_out
        gone = gone and not is_class(following[0]) and not is_model(following[0])
        cut = any(functions.resizes(s.fn) or s.code.crops for s in following)
        sized = stage.op.datasource.size is not None  # then they are as small as was asked for
        if not (gone and (next_is_udf(read) or not sized) or cut and not sized):
            continue
        if read.stages[-1] is not stage and accidental_split(read, read.outputs[0]):
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
                f"files have {megabytes(encoded)}; they are made smaller only in the next operator"
                + _why_apart(following[0].physical),
                "Decode and resize in one step: `read_binary_files` or `download`, then a map that "
                "decodes and crops; or `size=` in `read_images`",
                {"bytes_out": read.bytes_out, "bytes_of_files": encoded, "rows": read.rows},
            )


def _why_apart(following: Physical) -> str:
    """What keeps an operator from being fused with the read before it: it must collect rows."""
    for stage in following.stages:
        rows = getattr(stage.op, "min_rows_per_bundled_input", None)
        if rows and stage.kind == "Write":
            return f", which is not fused with the read: the write collects {rows} rows for a file"
        if rows:
            return f", which is not fused with the read: `{stage.name}` collects {rows} for a batch"
    return ""


def i3(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if not is_images(stage) or stage.op.datasource.size is not None:
            continue
        read, source = stage.physical, stage.op.datasource
        alone = _leaves_read(stage)
        shapes, ratio = _look_at_images(paths_of(source), source.mode)
        ragged = alone and any(s is None for _, s, _ in tensor_columns(read.schema).values())
        ragged = ragged or len(shapes) > 1
        encoded = _encoded_bytes(stage)
        if source.mode is not None and not (alone and ragged and next_is_udf(read)):
            continue  # fused with a map that makes the images equal: nothing ragged leaves
        if read.rows and encoded and read.stages[-1] is stage and not only_a_look(execution):
            ratio = read.bytes_out / encoded
        # A mode is a decision, and of equal images a read with one is harmless; so is an estimate
        # that is nearly right.
        following = [s for s in execution.after(stage) if s.kind != "Limit"]
        undecided = source.mode is None and alone and any(s.is_udf for s in following[:1])
        if ratio >= 2 and (ragged or undecided):
            given = [f"`{k}`" for k in ("size", "mode") if getattr(source, k) is None]
            of = f"images of {_shapes(shapes)}; " if ragged else ""
            yield Finding(
                "I3",
                stage.name,
                f"no {' and no '.join(given)}: {of}decoded they are "
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
    alike = following.kind == one.kind == "tasks"
    alike = alike and remote_arguments(one) == remote_arguments(following)
    return alike and "->SplitBlocks(" in one.name and users_blocks(read) is None


def _leaves_read(stage: Stage) -> bool:
    """Whether the images leave the operator as they were read; a fused filter changes none, nor
    does a map that only adds to the row what it finds in other columns."""
    later = stage.physical.stages[stage.physical.stages.index(stage) + 1 :]
    return all(s.kind == "Filter" or _adds_to_row(s) for s in later)


def _adds_to_row(stage: Stage) -> bool:
    code = stage.code
    used = code.known and stage.is_udf and not functions.resizes(stage.fn)
    return used and "image" not in code.strings and "image" in pixel_columns(stage.physical.schema)


def _shapes(shapes) -> str:
    if len(shapes) < 2:
        return "different shapes"
    some = ", ".join("x".join(map(str, s)) for s in sorted(shapes, key=str)[:3])
    return f"at least {len(shapes)} different shapes ({some}, ...)"


def _encoded_bytes(stage: Stage) -> int:
    with contextlib.suppress(Exception):
        return int(sum(stage.op.datasource._file_sizes()))
    return 0


def _look_at_images(paths, mode: str | None, at_most: int = 16):
    """Different shapes among some local files (headers only), and decoded to encoded bytes, when
    they are read in this mode, each in its own without."""
    from PIL import Image, ImageMode

    shapes, decoded, encoded = set(), 0, 0
    step = max(1, len(paths) // at_most)
    for path in paths[::step][:at_most]:
        with contextlib.suppress(Exception):
            with Image.open(path) as image:
                bands = len(ImageMode.getmode(mode or image.mode).bands)
                shapes.add((*image.size, mode or image.mode))
                decoded += image.size[0] * image.size[1] * bands
            encoded += os.path.getsize(path)
    return shapes, decoded / encoded if encoded else 0.0


def i4(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if stage.kind == "Filter" and stage.fn is not None and stage.code.expressible():
            yield from _late_filter(execution, stage, stage.code.columns_used())
        elif stage.kind == "MapBatches" and (used := stage.code.columns_of_a_mask()):
            yield from _late_filter(execution, stage, used)
        elif stage.kind == "ReadFiles" and not only_a_look(execution):
            yield from _unused_columns(execution, stage)


def _late_filter(execution: Execution, stage: Stage, used: set[str]) -> Iterator[Finding]:
    before = execution.before(stage)
    if not before or before[-1].kind not in ("ReadFiles", "Project"):
        return
    read = next((s for s in before if s.kind == "ReadFiles"), None)
    if read is None or any(s.is_udf for s in before) or only_a_look(execution):
        return
    columns = set(getattr(read.op.scanner.schema, "names", ()))
    if not used or not used <= columns:
        return
    footers = read.footers
    total = footers.rows if footers else None
    later = stage.physical.stages[stage.physical.stages.index(stage) + 1 :]
    # Behind a function on batches, one that is fused with it may have made other rows of these.
    known = stage.kind == "Filter" or not any(s.is_udf for s in later)
    kept = stage.physical.rows if known else None
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
        elif stage.kind == "Project" and used:  # behind a function: it cannot move into the read
            if any(type(e).__name__ == "StarExpr" for e in stage.op.exprs):
                return
            used |= set().union(*map(columns_of, stage.op.exprs))
            break
        else:
            return  # anything else may need all of them
    else:
        return
    unused = [c for c in columns if c not in used]
    footers = read.footers
    if not used or not unused or footers is None or not used <= set(columns):
        return
    total = sum(footers.columns.get(c, 0) for c in columns)
    wasted = sum(footers.columns.get(c, 0) for c in unused)
    share = wasted / total if total else 0
    # One unused id is nothing. Much of a small table, or half of a large one, is worth a line.
    large = wasted >= MIB and share >= 0.5
    if large or (wasted >= 32 * KIB and share >= 0.8) or (len(unused) >= 4 and share >= 0.5):
        yield Finding(
            "I4",
            read.name,
            f"{len(columns)} columns are read and {amount(len(used))} used "
            f"({', '.join(sorted(used)[:4])}); "
            f"the others are {share:.0%} of {megabytes(total)}",
            f"`read_parquet(...).select_columns({sorted(used)[:4]})`: it moves into the read",
            {"columns_read": len(columns), "columns_used": len(used), "bytes_unused": wasted},
        )


def i5(case: Case) -> Iterator[Finding]:
    """Tables in many tiny files. Images are files of their own: there, one job proves nothing."""
    jobs = defaultdict(list)
    for execution, stage in case.each():
        trial = only_a_look(execution) or any(s.kind == "Limit" for s in execution.stages)
        if stage.kind == "Read" and is_media(stage) and not trial:
            jobs[tuple(paths_of(stage.op.datasource))].append(stage)
    for paths, stages in jobs.items():
        mean = sum(_sizes(stages[0])) / max(1, len(paths))
        many = 100 if _is_remote(stages[0]) else 1000  # a request takes longer than an open
        if len(paths) >= many and len(stages) >= 2 and 0 < mean < 128 * KIB:
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
        if not stage.is_read or is_media(stage):
            continue
        if stage.kind == "ReadFiles":
            paths = parquet_files(listing(stage).paths)
            sizes = [os.path.getsize(p) for p in paths]
        else:
            sizes = _sizes(stage)
            paths = paths_of(stage.op.datasource)
        if any(set(paths) & set(other.written or {}) for other in case.executions):
            continue  # this script wrote them: O1 is the finding
        # 100 files that together would fit into one block of Ray Data (128 MiB).
        if len(sizes) >= 100 and sum(sizes) / len(sizes) < 128 * KIB:
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
            asked = users_blocks(stage)
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
            rows = rows or next((p.rows_in for p in physical.outputs if p.rows_in), None)
            size = sum(p.bytes_out or 0 for p in physical.inputs) or None
        if stage.kind == "Read" and (not rows or size is None):
            meta = stage.op.infer_metadata()
            rows, size = meta.num_rows or rows, meta.size_bytes
        if not rows:
            continue
        # Ray Data's own smallest block is 1 MiB; an eighth of it, or a row or two, is overhead.
        if rows / asked <= 2 or (size is not None and size / asked < 128 * KIB):
            each = f"{amount(round(rows / asked, 1))} rows"
            each += f" and {megabytes(size / asked)}" if size is not None else ""
            yield Finding(
                "I6",
                stage.name,
                f"{how} for {rows} rows on {amount(execution.cpus, 'CPU')}: {each} per block",
                "Leave the number of blocks to Ray Data, or take 2 to 4 per CPU",
                {"blocks": asked, "rows": rows, "bytes": size, "cpus": execution.cpus},
                "plan",
            )


_SOURCES = {"FromPandas": "from_pandas", "FromArrow": "from_arrow", "FromNumpy": "from_numpy"}


def i7(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if execution.cpus < 2:
            continue
        change = "Several blocks: no repartition, or 2 to 4 blocks per CPU"
        if stage.kind == "Repartition" and getattr(stage.op, "num_outputs", None) == 1:
            how = "`repartition(1)`"
        elif (
            stage.is_read
            and users_blocks(stage) == 1
            or stage.kind == "FromItems"
            and stage.op.num_outputs == 1
        ):
            how = "`override_num_blocks=1`"
        elif stage.kind in _SOURCES and stage.op.num_outputs == 1:
            how = f"one table in `{_SOURCES[stage.kind]}`"
        elif _one_row_group(stage):
            how = "a Parquet file with a single row group"
            change = "Several files or row groups (`row_group_size=`) where it is written"
        else:
            continue
        behind = [s for s in execution.after(stage) if s.is_udf]
        if not behind or behind[0].physical.tasks != 1 or only_a_look(execution):
            continue
        work = behind[0].physical
        # A small table is no loss in one piece: images, a megabyte or a second of work are. (Where
        # nobody asked for one piece, images are.)
        media = any(is_media(s) for s in execution.before(behind[0]))
        media |= any(s.code.decodes for s in behind)
        rows = rows_into(behind[0]) or 0
        size = max(work.bytes_out or 0, rows * (input_row_bytes(work) or 0))
        asked = stage.kind != "ReadFiles"
        if rows >= 16 and (media or asked and (size >= 1e6 or work.busy_s >= 1)):
            yield Finding(
                "I7",
                behind[0].name,
                f"{how} leaves one block of {rows} rows ({megabytes(size)}): one task works, "
                f"{amount(execution.cpus - 1)} of {amount(execution.cpus, 'CPU')} wait",
                change,
                {"tasks": 1, "rows": rows, "bytes": size, "cpus": execution.cpus},
            )


def _one_row_group(read: Stage) -> bool:
    footers = read.footers
    return footers is not None and len(footers.files) == footers.row_groups == 1


def i8(case: Case) -> Iterator[Finding]:
    """All rows kept in the middle for a single reader, or large ones collected on the driver."""
    for call in case.calls:
        last = call.executions[-1].operators[-1] if call.executions else None
        if call.parts and call.finished and last is not None:
            readers = [c for c in case.calls if c is not call and set(c.roots) & set(call.made)]
            readers = [c for c in readers if c.name not in ("schema", "size_bytes")]  # run nothing
            # Who also counts, or looks at some rows, has a use for it.
            work = [c for c in readers if c.name not in ("count", "show", "take", "take_batch")]
            # What fits anywhere may be kept for a look; 64 MB are much for one.
            floor = 1e6 if len(readers) == len(work) else 64e6
            spilled = sum(e.spilled for e in call.executions)
            pixels = pixel_columns(last.schema)
            if not readers and pixels and (call.bytes or 0) >= 1e6:
                yield Finding(
                    "I8",
                    last.name,
                    f"`{call.name}()` holds all {amount(call.rows or 0, 'row')} "
                    f"({megabytes(call.bytes)}, with the pixels in {', '.join(pixels)}) in the "
                    "object store, and nobody reads them",
                    "Return only the key and the result, and write them: the pipeline streams",
                    {"rows": call.rows, "bytes": call.bytes, "readers": 0},
                )
            elif not 1 <= len(work) <= call.parts and spilled >= MIB:
                yield Finding(
                    "I8",
                    last.name,
                    f"`{call.name}()` keeps {megabytes(call.bytes or 0)}, more than the object "
                    f"store holds: {megabytes(spilled)} went to disk and come back for each reader",
                    "Stream, or keep something smaller: uint8 or encoded files instead of floats",
                    {"rows": call.rows, "bytes": call.bytes, "spilled_bytes": spilled},
                )
            elif 1 <= len(work) <= call.parts and (call.bytes or 0) >= floor:
                yield Finding(
                    "I8",
                    last.name,
                    f"`{call.name}()` holds all {amount(call.rows or 0, 'row')} "
                    f"({megabytes(call.bytes)}) "
                    f"in the object store, and only `{work[0].name}` reads "
                    + ("them, once" if call.parts == 1 else "each part, once"),
                    "Leave it out: the pipeline streams, and holds few blocks at a time"
                    + ("" if call.parts == 1 else "; split the list of files instead"),
                    {"rows": call.rows, "bytes": call.bytes, "readers": len(work)},
                )
        if call.name in ("take_all", "to_pandas") and call.rows and last is not None:
            size, pixels = collected_bytes(call), pixel_columns(last.schema)
            # Labels and scores fit on any driver; 64 MB, or 1 MB of images, is data, not a result.
            if size >= 64e6 or (pixels and size >= 1e6):
                what = f", with the pixels in {', '.join(pixels)}" if pixels else ""
                yield Finding(
                    "I8",
                    last.name,
                    f"`{call.name}()` brought {amount(call.rows, 'row')} ({megabytes(size)}{what}) "
                    "into the "
                    "driver",
                    "Write from the workers (`write_parquet`) or stream with `iter_batches`; "
                    "select "
                    "the columns that are needed",
                    {"rows": call.rows, "bytes": size},
                )


def i9(case: Case) -> Iterator[Finding]:
    ran = defaultdict(list)
    for execution in full_executions(case):
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
        whole = all(same_end(e, executions[0]) for e in executions)
        # Branches that share their beginning may be meant; a model, or a second of work, is not.
        if not whole and not (gives_answers(stage) or is_images(stage) or sum(again) >= 1):
            continue
        yield Finding(
            "I9",
            stage.name,
            f"computed {len(executions)} times from the start"
            + (f" over {amount(rows, 'row')}" if rows else "")
            + f": by {consumers}; {sum(again):.1f} s of work done again",
            "One execution: write once and read counts and samples from what was written, or "
            "`materialize()` a small result once and use it",
            {"executions": len(executions), "rows": rows, "seconds_again": round(sum(again), 2)},
        )
    yield from _large_looks(case)


def _large_looks(case: Case) -> Iterator[Finding]:
    """A look at some rows, for which the model ran over most of what another execution needs, or
    for a good part of its time: it starts anew each time."""
    for look in case.executions:
        models = [s for s in look.stages if gives_answers(s)] if only_a_look(look) else []
        for full in full_executions(case) if models else ():
            same = [s for s in full.stages if s.signature == models[-1].signature]
            looked_at, seconds = models[-1].physical.rows or 0, models[-1].physical.busy_s
            of = (same[0].physical.rows or 0) if same and not full.error else 0
            much = looked_at >= of / 2 and seconds >= 1
            long = look.seconds is not None and look.seconds >= max(2, full.seconds / 5)
            if of >= 16 and (much or long):
                took = f", {look.seconds:.1f} s with its start" if long else ""
                yield Finding(
                    "I9",
                    models[-1].name,
                    f"`{look.consumer}` shows some rows, and the model ran over "
                    f"{looked_at} of {of} for it ({seconds:.1f} s of work{took}); "
                    f"`{full.consumer}` does it again, in {full.seconds:.1f} s",
                    "Write first, then look at what was written; or put `limit` in front of the "
                    "model for a look",
                    {"executions": 2, "rows": looked_at, "seconds_again": round(seconds, 2)},
                )
                break


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
    return stage.is_udf or is_images(stage) or stage.kind == "Download"


def i10(case: Case) -> Iterator[Finding]:
    for _, stage in case.each():
        cpus = _own_cpus(stage)
        if is_images(stage) and cpus is not None and 0 <= cpus < 1:
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
    yield from swallowed(case, "I11", lambda s: not is_model(s))
