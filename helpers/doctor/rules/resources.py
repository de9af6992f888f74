"""R: who gets cores and GPUs, and how much."""

import os
from collections.abc import Iterator

from helpers.doctor import functions
from helpers.doctor.execution import Execution, Physical, Stage
from helpers.doctor.report import Finding
from helpers.doctor.rules.case import (
    MIB,
    Case,
    amount,
    bytes_per_row,
    full_executions,
    gives_answers,
    gpus_of,
    input_of,
    input_row_bytes,
    is_class,
    named_like_a_model,
    only_a_look,
    pixel_columns,
    rows_into,
    schema_into,
    sized_blocks,
    tensor_bytes,
)
from helpers.plots import megabytes


def r1(case: Case) -> Iterator[Finding]:
    for execution in full_executions(case):
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
                    f"{amount(execution.cpus, 'CPU')} were there and mostly idle",
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
        threads = stage.code.torch_threads(cores, functions.constructor_arguments(stage.op))
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
                f"{amount(workers, 'worker')}: "
                f"{amount(together)} threads on {amount(execution.cpus, 'CPU')}",
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
                f"the actors hold {held:g} of {amount(execution.cpus, 'CPU')}, and the tasks that "
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
                f"{physical.name} waits for {amount(physical.gpus, 'GPU')}, and Ray has "
                f"{amount(execution.gpus)}."
            )
        need = max(physical.cpus, physical.per_actor[0])
        if need > execution.cpus:
            has = amount(execution.cpus)
            return f"{physical.name} waits for {amount(need, 'CPU')}, and Ray has {has}."
    held, need, names = _held_cpus(execution)
    if names and need and held + need > execution.cpus + 1e-6:
        total = amount(execution.cpus, "CPU")
        return f"{' and '.join(names)} hold {held:g} of {total}; tasks need {need:g}."
    return ""


def r5(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        if gpus_of(stage) <= 0:
            continue
        if stage.is_read:
            what = "a read"
        elif stage.is_udf and stage.code.known and not stage.code.uses_accelerator_library:
            # A stand-in for a model may have no library either: only decoding and resizing count.
            if is_class(stage) and stage.code.looks_like_model:
                continue
            others = [s for s in execution.stages if s is not stage and gpus_of(s) > 0]
            if stage.code.decodes or stage.code.resizes or "Image" in stage.code.text:
                what = "a function that decodes or resizes on the CPU"
            elif any(gives_answers(s) for s in others) and not named_like_a_model(stage):
                what = "a function that prepares for the model, or comes after it"
            else:
                continue
        else:
            continue
        yield Finding(
            "R5",
            stage.name,
            f"`num_gpus={gpus_of(stage):g}` on {what}: no library in its code can use a GPU",
            "`num_gpus` only on the step that runs the model",
            {"num_gpus": gpus_of(stage)},
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
                    f"{amount(smallest)} replicas with `num_gpus={share:g}` need "
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
                        f"`num_gpus={share:g}`: {amount(fit, 'replica')} per GPU, and "
                        f"{1 - fit * share:.0%} of "
                        "each GPU stays unused",
                        "A fraction that divides 1: 0.5, 0.33, 0.25",
                        {"num_gpus": share, "replicas_per_gpu": fit},
                        "plan",
                    )


def r7(case: Case) -> Iterator[Finding]:
    for execution, stage in case.each():
        physical = stage.physical
        if stage.kind != "MapBatches" or not physical.inputs or physical.stages[0] is not stage:
            continue
        size = stage.op.batch_size
        if (
            size is None
            and physical.tasks
            and is_class(stage)
            and not sized_blocks(execution, stage)
        ):
            size = round((rows_into(stage) or 0) / physical.tasks)  # a batch is a whole block
        if not isinstance(size, int) or size < 128:
            continue
        source = case.source_of(execution, physical)
        schema = schema_into(stage) or (source.schema if source else None)
        images = pixel_columns(schema).values()
        for_cpu = images and gives_answers(stage) and not gpus_of(stage)
        if size < 256 and not for_cpu:
            continue
        row, rows = bytes_per_row(source) if source else None, rows_into(stage)
        size = min(size, rows or size)
        # A model turns each byte of a pixel into a float of four, and makes larger things of it.
        floats = 4 if for_cpu and any(kind == "uint8" for kind, _, _ in images) else 1
        floor = (64 if for_cpu else 256 if gpus_of(stage) else 128) * MIB
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
        if execution.spilled >= MIB:
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
    for execution in full_executions(case):
        for physical in execution.operators:
            if physical.kind != "actors" or not physical.has_run or not physical.pool:
                continue
            if execution.error:
                continue
            smallest = physical.pool[0]
            what = f"{smallest} actors were started and there were {amount(physical.tasks, 'task')}"
            numbers = {"actors": smallest, "tasks": physical.tasks}
            idle = smallest - physical.tasks
            # Two actors for one block happen in any small run; two without work do not, nor does a
            # quarter of four.
            if idle >= 2 or (smallest >= 4 and idle >= smallest / 4):
                yield Finding(
                    "R9",
                    physical.name,
                    f"{what}: {idle} never got work",
                    "A pool that grows: `ActorPoolStrategy(min_size=1, max_size=...)`; or more "
                    "blocks",
                    numbers,
                )
            # Models that share cores compute no faster, and each has to start and to load first.
            elif (
                smallest > max(2, execution.cpus)
                and not physical.gpus
                and physical.tasks <= 4 * smallest
                and any(
                    gives_answers(s) and s.code.uses_accelerator_library for s in physical.stages
                )
            ):
                yield Finding(
                    "R9",
                    physical.name,
                    f"{what}, on {amount(execution.cpus, 'CPU')}: each of them starts and loads "
                    f"the model, and answers {amount(round(physical.tasks / smallest, 1), 'task')}",
                    "One single-threaded actor for each core, `ActorPoolStrategy(size=...)` from "
                    "`ray.cluster_resources()`",
                    numbers | {"cpus": execution.cpus},
                )


def r10(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        stages = execution.stages
        if only_a_look(execution):
            continue
        for stage in stages:
            models = [s for s in case.after(execution, stage) if gives_answers(s)]
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
            users = [s for s in case.after(execution, stage) if s.is_udf]
            if users and not models:
                yield from _pixels_in_order(execution, stage, users)
            if users and getattr(stage.op, "keys", None):
                yield from _pixels_in_groups(stage, users[0])
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


def _pixels_in_order(execution: Execution, stage: Stage, users: list[Stage]) -> Iterator[Finding]:
    """Without a model: pixels are moved for an order, and a later step makes them small."""
    moved = sum(p.bytes_out or 0 for p in stage.physical.inputs)
    moved = max(moved, (stage.physical.rows or 0) * (input_row_bytes(stage.physical) or 0))
    pixels = pixel_columns(schema_into(stage))
    if stage.kind == "RandomShuffle" and stage is stage.physical.stages[-1]:
        # It is fused with what is before it, and counts neither rows nor bytes.
        pixels = pixel_columns(stage.physical.schema)
        row = sum(tensor_bytes(kind, shape) for kind, shape, _ in pixels.values() if shape)
        moved = max(moved, row * (users[0].physical.rows_in or 0))
    for_nothing = stage.kind == "Sort" or _random_for_nothing(execution, stage, users[0])
    if for_nothing and pixels and moved >= 1e6:
        yield Finding(
            "R10",
            stage.name,
            f"{megabytes(moved)} of pixels are moved for an order, and `{users[0].name}` may only "
            "start afterwards",
            "Compute first, keep a key, and sort the small result if it has to be",
            {"bytes": moved},
            "plan",
        )


def _random_for_nothing(execution: Execution, shuffle: Stage, user: Stage) -> bool:
    """Whether rows are shuffled, and not to sample or split them, and the next step leaves no image
    of them: a random order of images may be the purpose."""
    parted = execution.call is not None and execution.call.parts > 1
    parted |= any(s.kind == "Limit" for s in execution.after(shuffle))
    left = not user.physical.rows or pixel_columns(user.physical.schema)
    return shuffle.kind == "RandomShuffle" and not parted and not left


def _pixels_in_groups(stage: Stage, user: Stage) -> Iterator[Finding]:
    """Pixels that go along when groups are brought together, for a function that uses none."""
    source = input_of(stage.physical)
    moved = source.bytes_out or 0 if source else 0
    used = user.code.columns_used()
    unused = [n for n in pixel_columns(schema_into(stage)) if used is not None and n not in used]
    if stage.kind == "Repartition" and unused and moved >= 1e6:
        yield Finding(
            "R10",
            stage.name,
            f"{megabytes(moved)} are moved to bring groups together, with the pixels in "
            f"{', '.join(unused)}, and `{user.name}` does not use them",
            "`select_columns([...])` in front of `groupby`: the key and what the function needs",
            {"bytes": moved},
            "plan",
        )


def r11(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if not execution.gpus or any(p.gpus for p in execution.operators):
            continue
        for stage in execution.stages:
            if is_class(stage) and "torch" in stage.code.text and stage.code.model_built_in_init:
                yield Finding(
                    "R11",
                    stage.name,
                    f"Ray has {amount(execution.gpus, 'GPU')}, and no step of the pipeline asks "
                    "for one",
                    "`num_gpus=1` on the step that runs the model, where there is a GPU",
                    {"gpus": execution.gpus},
                    "plan",
                )
