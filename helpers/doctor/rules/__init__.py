"""The doctor's rules: one function for each mistake, from what was observed to findings.

Each rule has a floor below which it stays silent, with its reason beside it. A false alarm is worse
than a missed finding: where an intended design looks the same as a mistake, there is no finding.
"""

import os

from helpers.doctor.report import Finding
from helpers.doctor.rules.case import Case, Rule
from helpers.doctor.rules.ingestion import i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11
from helpers.doctor.rules.output import o1, o2, o3, o4, o5, o6, o7, o8
from helpers.doctor.rules.production import p1, p2
from helpers.doctor.rules.resources import cannot_start as cannot_start
from helpers.doctor.rules.resources import r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11
from helpers.doctor.rules.transformation import t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11


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
    "T3": Rule("`batch_size`; rows per task; a loop around the model", t3),
    "T4": Rule("type of the tensors between operators", t4),
    "T5": Rule("columns and bytes that leave the model", t5),
    "T6": Rule("`num_cpus`, limits and actors of neighbors that are not fused", t6),
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


def catalog_column(mistake_id: str) -> str:
    """For the mistake index: how the doctor sees a mistake, or why it cannot."""
    if mistake_id in RULES:
        return RULES[mistake_id].sees
    return "not visible: " + CANNOT_SEE.get(mistake_id, "there is no rule for it")
