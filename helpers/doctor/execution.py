"""What was observed: calls of the user, executions, their operators and the steps in them."""

from dataclasses import dataclass, field

from helpers.doctor import functions


@dataclass(eq=False)
class Stage:
    """One step as the user wrote it: a logical operator."""

    kind: str  # class name of the logical operator: "Read", "MapRows", "MapBatches", "Write", ...
    op: object
    signature: tuple  # equal for the same work on the same data
    physical: "Physical" = field(default=None, repr=False)
    footers: "Footers | None" = field(default=None, repr=False)  # of Parquet files that it reads

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
        return functions.facts(self.fn)

    @property
    def name(self) -> str:
        return getattr(self.op, "name", None) or self.kind


@dataclass
class Footers:
    """What the footers of Parquet files say."""

    rows: int
    columns: dict[str, int]  # uncompressed bytes
    files: list[int]  # sizes
    row_groups: int


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
    made: tuple = ()  # materialize and splits: the sources that the results are
    parts: int = 0  # how many datasets it made of one, whole in the object store
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
