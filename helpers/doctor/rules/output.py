"""O: where the answers go."""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.doctor.execution import Execution, Stage
from helpers.doctor.plan import listing, operation, parquet_files, parquet_rows, paths_of, rows_in
from helpers.doctor.report import Finding
from helpers.doctor.rules.case import (
    KIB,
    MIB,
    Case,
    amount,
    binary_columns,
    collected_bytes,
    elements,
    full_executions,
    gives_answers,
    input_row_bytes,
    is_class,
    is_images,
    named_like_a_model,
    pixel_columns,
    same_end,
    schema_into,
    sink_of,
    tensor_columns,
)
from helpers.plots import megabytes


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
    kind = type(sink_of(execution.write)).__name__.removesuffix("Datasink")
    return kind if kind in ("Parquet", "CSV", "JSON") else ""


def o1(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        files = _data_files(execution)
        if not _table_sink(execution) or getattr(sink_of(execution.write), "partition_cols", None):
            continue
        # Ray Data's own choice for a small input is two blocks per CPU, for each of the inputs.
        inputs = sum(not s.op.input_dependencies for s in execution.stages)
        few = max(24, 3 * execution.cpus * max(1, inputs))
        mean = sum(files.values()) / len(files) if files else 0
        if len(files) > few and mean < MIB:
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
        work = [s for s in before if s.is_udf or is_images(s)]
        blocks = max((p.blocks or 0 for p in (last.physical.inputs if last else [])), default=0)
        files = _data_files(execution)
        size = sum(files.values())
        # A small table may well be one file.
        if one and not summary and work and blocks != 1 and size >= 1e6:
            yield Finding(
                "O2",
                write.name,
                f"`repartition(1)` collects {amount(blocks)} blocks in one task before anything is "
                "written" + (f": one file of {megabytes(size)}" if files else ""),
                "No repartition; `min_rows_per_file=` in the write makes few files while it "
                "streams",
                {"blocks": blocks, "files": len(files), "bytes": size},
            )
        elif (held := _rows_held(write)) > 2e9 and size >= 1e6:
            yield Finding(
                "O2",
                write.name,
                f"`min_rows_per_file={sink_of(write).min_rows_per_file}`: a task waits until it "
                f"has {megabytes(held)} to write; here that is {megabytes(size)} in "
                f"{amount(len(files), 'file')}",
                "As many rows as make a file of about 128 MB to 1 GB",
                {"files": len(files), "bytes": size, "bytes_per_file": held},
            )
        elif len(files) == 1 and sum(files.values()) > 1e9:
            yield Finding(
                "O2",
                write.name,
                f"one file of {megabytes(sum(files.values()))}: one worker writes, one will read",
                "Files of about 128 MB to 1 GB: `max_rows_per_file=`",
                {"files": 1, "bytes": sum(files.values())},
            )


def _rows_held(write: Stage) -> float:
    """Bytes of as many rows as a file is to have at least; 0 where that was not said."""
    rows = getattr(sink_of(write), "min_rows_per_file", None)
    alone = write.physical.stages[0] is write
    return rows * (input_row_bytes(write.physical) or 0) if rows and alone else 0.0


_ITERATING = {"iter_rows", "iter_batches", "iter_torch_batches"}


def o3(case: Case) -> Iterator[Finding]:
    for call in case.calls:
        if (
            call.name not in {"take_all", "to_pandas"} | _ITERATING
            or not call.rows
            or not call.executions
        ):
            continue
        writer = next((w for w, rows in case.collected if rows == call.rows), None)
        execution = call.executions[-1]
        if any(s.kind in ("Aggregate", "Limit") for s in execution.stages):
            continue  # a summary is small, whatever the data
        if call.rows < 16 or not any(s.is_udf for s in execution.stages):
            continue
        if call.name != "take_all" and _is_small_table(call, execution):
            writer = None
        if writer:
            then = f"{writer} wrote them there"
            change = "`write_parquet` from the workers: no row passes through the driver"
        elif call.name in _ITERATING:
            continue  # a training loop, or a tally
        elif again := _written_again(case, execution):
            then = f"`{again.consumer}` ran the model a second time to write them"
            change = "`write_parquet` once, then read back the columns that you want to see"
        else:
            continue
        yield Finding(
            "O3",
            execution.operators[-1].name,
            f"`{call.name}()` brought {amount(call.rows, 'row')} "
            f"({megabytes(collected_bytes(call))}) into the driver, and {then}",
            change,
            {"rows": call.rows, "bytes": collected_bytes(call)},
        )


def _is_small_table(call, execution: Execution) -> bool:
    """Below 1 MB and no arrays in it: for such a table of labels the driver is a fine place."""
    schema = execution.operators[-1].schema
    if schema is None or tensor_columns(schema) or collected_bytes(call) >= 1e6:
        return False
    return not any(re.match(r"(large_|fixed_size_)?list", str(kind)) for kind in schema.types)


def _written_again(case: Case, collected: Execution) -> Execution | None:
    """The execution that wrote the same answers, for which a model ran again."""
    models = {s.signature for s in collected.stages if gives_answers(s)}
    for other in full_executions(case):
        if other is not collected and not other.error and _table_sink(other):
            again = models & {s.signature for s in other.stages}
            if again and same_end(collected, other):
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
        # A handful of scores per row is a table, and so are few rows with some more; 16 numbers or
        # more are an array.
        least = 16 if size < 100 * KIB else 10
        large = {k: s for k, s in arrays.items() if s is None or elements(s) >= least}
        if large or numbers >= least:
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
            lists += re.findall(r"(?:-?\d[\d.eE+\-]*[ ;|]+){9,}-?\d", head)
            return max((len(re.findall(r"\d[\d.eE+\-]*", text)) for text in lists), default=0)
    return 0


def o5(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not _table_sink(execution):
            continue
        write, physical = execution.write, execution.write.physical
        models = [s for s in case.before(execution, write) if gives_answers(s)]
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
        unread = _unread(case, execution, schema)
        heavy = list(dict.fromkeys([*pixel_columns(schema), *binary_columns(schema), *unread]))
        total = sum(sizes.values()) or sum(_data_files(execution).values())
        mine = sum(sizes.get(name, 0) for name in heavy) if sizes else total
        makers = [s for s in models if is_class(s) or named_like_a_model(s)]
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
    models = [s for s in before if gives_answers(s)]
    given = tensor_columns(schema_into(models[-1])) if models else {}
    for name, (_, shape, _) in tensor_columns(schema).items():
        if name in given and shape and given[name][1] == shape and elements(shape) >= 256:
            found.append(name)
    return found


def o6(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        columns = (
            getattr(sink_of(execution.write), "partition_cols", None) if execution.write else None
        )
        files = _data_files(execution)
        if not columns or not files:
            continue
        folders = {str(Path(f).parent) for f in files}
        rows = parquet_rows(files)
        # Ten rows per folder or fewer, or hundreds of tiny files: opening costs more than reading.
        tiny = len(folders) >= 100 and sum(files.values()) / len(files) < 32 * KIB
        if len(folders) >= 16 and rows and (rows / len(folders) <= 10 or tiny):
            yield Finding(
                "O6",
                execution.write.name,
                f"`partition_cols={list(columns)}`: {len(folders)} folders and {len(files)} "
                "files for "
                f"{amount(rows, 'row')}",
                "Partition by something with few values (a day, a class), or not at all",
                {"folders": len(folders), "files": len(files), "rows": rows},
            )


def o7(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not _table_sink(execution) or not execution.existing or not execution.written:
            continue
        mode = str(getattr(sink_of(execution.write), "mode", "")).lower()
        asked = "mode" in (execution.call.keywords if execution.call else {})
        if asked or not mode.endswith("append"):
            continue
        suffix = Path(next(iter(execution.written))).suffix
        old = [f for f in execution.existing if f.endswith(suffix)]
        new = list(_data_files(execution))
        before, now = rows_in(old), rows_in(new)
        # Other rows may be appended on purpose. As many again, once or more, are the same ones; and
        # so are those of files that this script has read for the same folder before.
        again = _same_files_again(case, execution)
        trial = _trial_before(case, execution)
        twice = _keys_twice(old, new, suffix)
        same = before and now and before % now == 0 and not _other_source(case, execution)
        if before and now and (again or trial or same or twice):
            yield Finding(
                "O7",
                execution.write.name,
                f"the folder had {amount(before, 'row')} in {amount(len(old), 'file')} and got "
                f"{amount(now)} more"
                + (f", and {again} of the files read were read for it before" if again else "")
                + (", the first from a trial with `limit` of the same work" if trial else "")
                + (f", {twice[1]} with a {twice[0]!r} that was there before" if twice else "")
                + ": the default mode appends",
                '`mode="overwrite"`, or a new folder for each run',
                {"rows_before": before, "rows_written": now},
            )


_KEY = re.compile(r"path|(^|_)id$|name|uri|url|file|key", re.IGNORECASE)


def _keys_twice(old: list[str], new: list[str], suffix: str) -> tuple[str, int] | None:
    """A column of text that tells the new rows apart, and how many of its values the old files
    have, where these are half of them or more."""
    import pandas as pd

    read = {
        ".parquet": pd.read_parquet,
        ".csv": pd.read_csv,
        ".json": functools.partial(pd.read_json, lines=True),
    }.get(suffix)
    if read is None or len(old) + len(new) > 200:
        return None
    with contextlib.suppress(Exception):  # remote, or of another form
        if sum(Path(name).stat().st_size for name in [*old, *new]) > 64 * MIB:
            return None
        before, now = (pd.concat([read(name) for name in names]) for names in (old, new))
        for column in [c for c in now.columns if _KEY.search(str(c)) and c in before.columns]:
            if pd.api.types.is_numeric_dtype(now[column]):
                continue  # each source may count its rows from 0
            keys, known = set(now[column]), set(before[column])
            twice = len(keys & known)
            if len(keys) >= 0.9 * len(now) and twice >= max(1, min(len(keys), len(known)) / 2):
                return str(column), twice
    return None


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
        return parquet_files(listing(stage).paths)
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


def o8(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        write = execution.write
        if write is None:
            continue
        before = case.before(execution, write)
        models = [s for s in before if gives_answers(s)]
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
    return bool(names) and all(_KEY.search(name) for name in names)
