"""The settings that follow from the device, in one place, and starting Ray on it."""

import contextlib
import importlib
import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from helpers.hardware import Device as Device
from helpers.hardware import Gpu as Gpu
from helpers.hardware import cgroup_limits, detect, html_table, text_table, usable_cores

_GB = 1e9


# ---- what follows from it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What suits the device. `reasons` has one sentence for each value. Made by `recommend()`."""

    torch_device: str  # "cpu", "cuda" or "mps"
    batch_size: int  # images
    precision: str  # "float32", "bfloat16" or "float16"
    channels_last: bool
    threads: int  # of torch in one model actor
    actors: int  # model replicas
    cpus_per_actor: float | None  # None: Ray Data's default of 1
    gpus_per_actor: float | None
    decode_tasks: int  # how many fit beside the actors
    images_per_block: int  # what one read task reads
    tolerance: float  # largest difference of a logit that only rounding explains
    reasons: dict[str, str]

    def to_dict(self) -> dict:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str, str]]:
        values = asdict(self)
        return [(name, str(values[name]), reason) for name, reason in self.reasons.items()]

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(("setting", "value", "because"), self._rows())


def recommend(
    device: Device | None = None, free_cpus: int = 1, images: int | None = None
) -> Settings:
    """Settings for the device, or for the whole cluster when Ray runs.

    At least `free_cpus` CPUs stay free of model actors, for the tasks that read and decode. Some
    features need one more (a checkpoint's filter is an actor of its own): then ask for 2.
    `images`: how many there are, where that is known; a few need no replica for each core.
    """
    device = device or detect()
    cpus = int(device.cluster["CPU"]) if device.cluster else device.usable_cores
    cpus, why = max(1, cpus), {}
    why["torch_device"] = (
        "Where the model runs: "
        + {
            "cuda": "there is a GPU.",
            "mps": "there is an Apple GPU.",
            "cpu": "there is no GPU.",
        }[device.kind]
    )
    batch_size = _batch_size(device, why)
    precision, tolerance = _precision(device, why)
    if device.kind == "cpu":
        actors, cpus_per_actor, gpus_per_actor = _cpu_pool(device, cpus, free_cpus, images, why)
    else:
        actors, cpus_per_actor, gpus_per_actor = _gpu_pool(device, cpus, free_cpus, why)
    held = actors * (1 if cpus_per_actor is None else cpus_per_actor)
    decode_tasks = max(1, math.floor(cpus - held + 1e-6))
    why["decode_tasks"] = f"{cpus} CPUs, of which the actors hold {held:g}; each task takes one."

    images_per_block = _images_per_block(device, precision, why)
    channels_last = device.kind != "mps"
    why["channels_last"] = (
        "The order in memory in which convolutions work: without it they convert back and forth."
        if channels_last
        else "Not tried on this device."
    )
    why["tolerance"] = f"How far logits in {precision} may be from others by rounding alone."
    return Settings(
        torch_device=device.kind,
        batch_size=batch_size,
        precision=precision,
        channels_last=channels_last,
        threads=_threads(device, why),
        actors=actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
        decode_tasks=decode_tasks,
        images_per_block=images_per_block,
        tolerance=tolerance,
        reasons=why,
    )


def _batch_size(device: Device, why: dict) -> int:
    if device.kind == "cpu":
        why["batch_size"] = (
            "A single image keeps a core busy; large batches only leave its cache. Some images "
            "spread what a call costs."
        )
        return 8
    gigabytes = min((gpu.memory_bytes for gpu in device.gpus), default=16 * _GB) / _GB
    size = 128 if gigabytes >= 12 else 64 if gigabytes >= 6 else 32
    why["batch_size"] = f"Enough to keep a GPU of {gigabytes:.0f} GB busy, far from filling it."
    return size


def _precision(device: Device, why: dict) -> tuple[str, float]:
    """Precision and the tolerance for logits that goes with it."""
    if device.kind == "cuda" and not device.gpus:
        why["precision"] = "The GPUs are on other nodes; all since 2020 have bf16 instructions."
        return "bfloat16", _TOLERANCE["bfloat16"]
    if device.native_bf16:
        why["precision"] = "There are bf16 instructions: half the bytes, a multiple of the speed."
        return "bfloat16", _TOLERANCE["bfloat16"]
    if device.kind == "cuda" and all(gpu.fp16 for gpu in device.gpus):
        why["precision"] = "No bf16 instructions, but tensor cores for float16."
        return "float16", _TOLERANCE["float16"]
    why["precision"] = "No bf16 instructions: emulating them would be slower than float32."
    # GPUs round the inputs of float32 convolutions to 10 bits (TF32).
    return "float32", _TOLERANCE["float32" if device.kind == "cpu" else "float16"]


def _images_per_block(device: Device, precision: str, why: dict) -> int:
    """Answers come a block at a time: few images make the first ones early, many spread what a task
    costs."""
    if device.kind == "cpu":
        why["images_per_block"] = (
            f"About a second of an actor's work in {precision}: the first answers come early, and "
            "what a task costs is still spread."
        )
        return 8 if precision == "float32" else 16
    why["images_per_block"] = (
        "Some batches for an actor, about a second of decoding for a task: work arrives early, and "
        "what a task costs is spread."
    )
    return 32


_TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0}


_IMAGES_PER_REPLICA = 32  # on one core about as long as a replica takes to start


def _cpu_pool(device: Device, cpus: int, free_cpus: int, images: int | None, why: dict):
    """One single-threaded replica for each core; together they reserve all but `free_cpus`."""
    by_memory = max(1, int(0.5 * device.memory_bytes / (1.5 * _GB)))
    nodes = device.cluster["nodes"] if device.cluster else 1
    possible = min(cpus, int(by_memory * nodes))
    worth = possible if images is None else math.ceil(images / _IMAGES_PER_REPLICA)
    actors = max(1, min(possible, worth))
    share = math.floor(max(0, cpus - free_cpus) / actors * 100) / 100
    share = min(share, 0.99)  # exactly 1 would fuse the preprocessing into the actor
    why["actors"] = (
        "One replica for each core: the model takes nearly all of the time. "
        + ("Memory allows no more (1.5 GB each). " if possible < cpus else "")
        + (f"But so few images ({images}) are not worth more starts." if actors < possible else "")
    ).strip()
    why["cpus_per_actor"] = (
        f"Leaves {cpus - actors * share:.2g} of {cpus} CPUs to the tasks, or everything would "
        "stop. And it differs from the 1 CPU of a task: with equal numbers Ray Data runs the "
        "preprocessing inside the model actor."
    )
    why["gpus_per_actor"] = "No GPU: asking for one would wait forever."
    return actors, share, None


def _gpu_pool(device: Device, cpus: int, free_cpus: int, why: dict):
    """One replica for each GPU, never more."""
    known = int(device.cluster["GPU"]) if device.cluster else len(device.gpus)
    actors = max(1, known)
    why["actors"] = "One replica for each GPU: a second one would only share its time."
    why["gpus_per_actor"] = "A whole one." if known else "Ray was told of no GPU."
    if actors + free_cpus <= cpus:
        why["cpus_per_actor"] = "Ray Data's default, 1: something must feed the GPU."
        return actors, None, 1 if known else None
    why["cpus_per_actor"] = f"With {cpus} CPUs, the tasks need all of them."
    return actors, 0, 1 if known else None


def _threads(device: Device, why: dict) -> int:
    why["threads"] = (
        "What Ray gives an actor with at most 1 CPU. One thread for each replica wastes less than "
        "several threads in one."
    )
    return 1


# ---- Ray ----------------------------------------------------------------------------------------

_FORWARDED = ("RESNET50_WEIGHTS", "COURSE_WEIGHTS", "IMAGENETTE_DIR")
_started: tuple | None = None  # the arguments of the Ray that this module started


def start_ray(
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
    quiet: bool = True,
    object_store_memory: int | None = None,
) -> None:
    """Connect to the cluster in RAY_ADDRESS, or to the one that `ray start` left running on this
    machine; else start Ray here. Prints nothing.

    `num_cpus`: Ray's logical CPUs; by default COURSE_CPUS, else the usable cores, at least 2, since
    the tasks need one beside the model. `num_gpus` may declare a GPU that is not there, to look at
    a GPU's plan. `object_store_memory`, in bytes, may make the object store small, to see it spill.
    `quiet=False` shows Ray's own messages. The same call again changes nothing, another one
    restarts Ray; a Ray that somebody else started is used as it is, with the CPUs it has.
    """
    global _started
    own = any((num_cpus, num_gpus, dashboard, object_store_memory))  # asks for a Ray of its own
    address = os.environ.get("RAY_ADDRESS") or (None if own else _running_cluster())
    _quiet_environment(quiet, starts=not address)
    import ray

    arguments = (address, num_cpus, num_gpus, dashboard, quiet, object_store_memory)
    if ray.is_initialized() and _started not in (None, arguments):
        ray.shutdown()
    if not ray.is_initialized():
        messages = {"log_to_driver": not quiet, "logging_level": "ERROR" if quiet else "INFO"}
        if address:
            _connect(address, messages)
        else:
            _start_here(
                address="local",
                num_cpus=num_cpus or _logical_cpus(),
                num_gpus=num_gpus,
                include_dashboard=dashboard,
                object_store_memory=object_store_memory or _object_store_bytes(),
                **messages,
            )
        _started = arguments
    _set_context(quiet)


def _logical_cpus() -> int:
    value = os.environ.get("COURSE_CPUS") or max(2, usable_cores())
    if not str(value).isdigit() or int(value) < 2:
        raise ValueError(f"COURSE_CPUS is {value!r}; set it to a whole number of CPUs, 2 or more.")
    return int(value)


def _quiet_environment(quiet: bool, starts: bool) -> None:
    """What must be set before Ray is imported; a value of the user's own stays."""
    if starts:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home
        # The raylet often asks for its object store a moment too early, and by default waits a
        # second before it asks again. As many seconds in all, in smaller steps.
        os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
        os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "200")
    elif Path("~/.ray/auth_token").expanduser().exists():
        # If it was there at `ray start`, the cluster asks for it; another cluster does not mind.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray reads Parquet footers with 32 actors by default; on a small machine they take half a
    # minute to start.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", str(min(32, usable_cores())))
    os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")  # `detect` has the better one
    if quiet:
        # Each actor pool logs an error about its constructor's arguments that is none.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # closed connections at the end


def _start_here(**arguments) -> None:
    import ray

    Thread(target=_import_meanwhile).start()
    for attempts_left in (2, 1, 0):
        try:
            _init(**arguments)
            _wait_for_free_cpus()
            return
        except Exception as error:
            # Ray gives its own processes 30 seconds, too little for a machine that is busy.
            if not attempts_left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _import_meanwhile() -> None:
    """What is needed next, since Ray's start is mostly waiting for its processes."""
    with contextlib.suppress(ImportError):  # Ray looks for it before it starts the dashboard
        importlib.import_module("ray.dashboard.optional_deps")
    importlib.import_module("ray.data")


def _init(**arguments) -> None:
    """`ray.init`, with what its C++ part writes shown only if it fails."""
    import ray

    if arguments["log_to_driver"]:
        ray.init(**arguments)
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            ray.init(**arguments)
        except BaseException:
            written.seek(0)
            os.write(stderr, written.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _wait_for_free_cpus(seconds: float = 10) -> bool:
    """Whether a CPU is free, at the latest after some seconds. Ray reports what is free a moment
    after its start only; until then Ray Data warns of no CPUs."""
    import ray

    end = time.monotonic() + seconds
    while not (free := ray.available_resources().get("CPU")) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(free)


def _still_true(record: logging.LogRecord) -> bool:
    """Ray Data warns that it will hang if it finds no CPU free, and looks for one after a write,
    too, when the report of what is free can lag behind the write's own CPUs."""
    no_cpus = "does not have any available CPUs" in record.getMessage()
    return not (no_cpus and _wait_for_free_cpus(seconds=2))


def _running_cluster() -> str | None:
    """The address of the cluster that `ray start` left on this machine, if it answers."""
    # Where `ray start` writes it. Ray itself is not asked: it must not be imported yet.
    file = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=1).close()
    except (OSError, ValueError):
        return None
    return address


def _connect(address: str, messages: dict) -> None:
    """Join a cluster. Nodes other than this one get this package along."""
    import ray

    _init(address=address, **messages)
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        here = ray.util.get_node_ip_address()
        if ray.nodes()[0]["NodeManagerAddress"] in (here, "127.0.0.1"):
            return
    ray.shutdown()
    variables = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    package = str(Path(__file__).parent)
    environment = {"py_modules": [package], "env_vars": variables}
    _init(address=address, runtime_env=environment, **messages)


def _object_store_bytes() -> int:
    """At most 4 GB, 30 % of the memory, and what shared memory has free."""
    import psutil

    memory = min(psutil.virtual_memory().total, cgroup_limits()[1] or math.inf)
    limits = [4 * _GB, 0.3 * memory]
    if sys.platform == "darwin":
        limits.append(2 * _GB)  # Ray's own limit there
    elif Path("/dev/shm").is_dir():
        limits.append(0.9 * shutil.disk_usage("/dev/shm").free)
    return int(max(min(limits), 100e6))  # Ray does not start with less than about 80 MB


def _set_context(quiet: bool) -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = 60  # a hang shall say so during the lesson
    context.enable_progress_bars = False
    # After the import, which sets the level itself.
    logging.getLogger("ray.data").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet:  # it stands in the lessons, where it is measured
        warnings.filterwarnings("ignore", message="Use 'expr' instead of 'fn'")
    logging.getLogger("ray.data.dataset").addFilter(_still_true)
    # It warns once that progress bars are off, which is what was asked for.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if quiet:
        # More workers than cores make the raylet warn on stdout; some lessons want just that.
        from ray._private import ray_logging

        with contextlib.suppress(AttributeError):
            skip = ray_logging.stdout_deduplicator.skip_re
            ours = re.compile("worker processes have been started")
            ray_logging.stdout_deduplicator.skip_re = skip or ours
