"""What this machine and the cluster have: CPU, limits of the container, memory, GPUs."""

import html
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_GB = 1e9


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    bf16: bool  # has instructions for it, rather than emulating it
    fp16: bool


@dataclass(frozen=True)
class Device:
    """This machine, and the cluster when Ray runs. Made by `detect()`."""

    kind: str  # "cpu", "cuda" or "mps": where the model should run
    cpu: str
    physical_cores: int
    logical_cores: int
    affinity_cores: int  # how many of them this process may use
    cpu_quota: float | None  # cores that the container may keep busy on average
    usable_cores: int  # the least of these, at least 1
    memory_bytes: int  # of the machine, or the container's limit
    simd: str
    cpu_bf16: bool
    gpus: tuple[Gpu, ...] = ()
    cluster: dict[str, float] | None = None  # CPU, GPU, nodes; None while Ray does not run
    warnings: tuple[str, ...] = ()

    @property
    def native_bf16(self) -> bool:
        """Whether the part that runs the model has instructions for bfloat16."""
        if self.kind == "cuda":
            return bool(self.gpus) and all(gpu.bf16 for gpu in self.gpus)
        return self.kind == "cpu" and self.cpu_bf16

    @property
    def summary(self) -> str:
        """One line for captions."""
        parts = [f"{self.usable_cores} x {self.cpu}", f"{self.memory_bytes / _GB:.0f} GB"]
        if self.gpus:
            parts.append(f"{len(self.gpus)} x {self.gpus[0].name}")
        elif self.kind == "mps":
            parts.append("Apple GPU")
        else:
            parts.append("no GPU")
        if self.cluster and self.cluster["nodes"] > 1:
            parts.append(
                f"cluster of {self.cluster['nodes']:.0f} nodes, {self.cluster['CPU']:.0f} CPUs, "
                f"{self.cluster['GPU']:.0f} GPUs"
            )
        return ", ".join(parts)

    def to_dict(self) -> dict:
        extra = {"native_bf16": self.native_bf16, "summary": self.summary}
        return asdict(self) | extra

    def _rows(self) -> list[tuple[str, str]]:
        quota = "no limit" if self.cpu_quota is None else f"{self.cpu_quota:g} cores"
        rows = [
            ("Model runs on", {"cpu": "CPU", "cuda": "NVIDIA GPU", "mps": "Apple GPU"}[self.kind]),
            ("CPU", f"{self.cpu} ({self.simd}, bf16 instructions: {_yes(self.cpu_bf16)})"),
            ("Cores", f"{self.physical_cores} physical, {self.logical_cores} logical"),
            ("Usable", f"{self.usable_cores} (affinity {self.affinity_cores}, quota {quota})"),
            ("Memory", f"{self.memory_bytes / _GB:.1f} GB"),
        ]
        for gpu in self.gpus:
            size = f"{gpu.memory_bytes / _GB:.0f} GB"
            rows.append(("GPU", f"{gpu.name}, {size}, bf16 instructions: {_yes(gpu.bf16)}"))
        if self.cluster is not None:
            cluster = (f"{value:g} {name}" for name, value in self.cluster.items())
            rows.append(("Ray", ", ".join(cluster)))
        return rows + [("Warning", text) for text in self.warnings]

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(("device", "found"), self._rows())


def detect() -> Device:
    """Look at this machine, and at the cluster when Ray runs.

    Without a GPU this does not import torch: a driver that starts a pipeline need not wait for it.
    """
    import psutil

    logical, affinity = os.cpu_count() or 1, _affinity()
    quota, memory_limit = cgroup_limits()
    memory = psutil.virtual_memory().total
    warnings = []
    if quota is not None and quota < affinity:
        warnings.append(
            f"{affinity} cores are visible, but this container may use {quota:g}: programs that "
            "count the visible ones start too many threads."
        )
    gpus = _gpus()
    cluster = _cluster()
    if gpus and cluster is not None and not cluster["GPU"]:
        warnings.append("This machine has a GPU, but Ray was started without one.")
    return Device(
        kind=_kind(gpus, cluster),
        cpu=_cpu_name(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        affinity_cores=affinity,
        cpu_quota=quota,
        usable_cores=usable_cores(),
        memory_bytes=min(memory, memory_limit or memory),
        simd=_simd(),
        cpu_bf16=_cpu_bf16(),
        gpus=gpus,
        cluster=cluster,
        warnings=tuple(warnings),
    )


def usable_cores() -> int:
    """The cores that this process can keep busy: affinity and the container's quota count."""
    return max(1, math.floor(min(_affinity(), cgroup_limits()[0] or math.inf)))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use; it is asked only where there is NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(Gpu(gpu.name, gpu.total_memory, bf16=gpu.major >= 8, fp16=gpu.major >= 7))
    return tuple(found)


def _cluster() -> dict[str, float] | None:
    """The cluster's totals. `accelerators` counts the kinds of GPU that Ray itself recognized."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    total = ray.cluster_resources()
    return {
        "CPU": total.get("CPU", 0.0),
        "GPU": total.get("GPU", 0.0),
        "accelerators": float(sum(name.startswith("accelerator_type:") for name in total)),
        "nodes": float(sum(node["Alive"] for node in ray.nodes())),
    }


def _kind(gpus: tuple[Gpu, ...], cluster: dict[str, float] | None) -> str:
    """Where a model can run. `ray.init(num_gpus=1)` may declare a GPU that is not there: it counts
    only if this machine has one or Ray itself recognized it."""
    if gpus and (cluster is None or cluster["GPU"]):
        return "cuda"
    if sys.platform == "darwin":
        import torch

        if torch.backends.mps.is_available():
            return "mps"
    return "cuda" if cluster and cluster["GPU"] and cluster["accelerators"] else "cpu"


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    names = _cpuinfo("model name") or _cpuinfo("Model")
    return " ".join(names.replace("(R)", "").replace("(TM)", "").split()) or platform.machine()


def _simd() -> str:
    """The widest vector instructions, as far as they matter to torch."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    names = {"amx_tile": "AMX", "avx512f": "AVX512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
    found = next((name for flag, name in names.items() if flag in flags), "")
    return found or ("NEON" if platform.machine() in ("arm64", "aarch64") else "no wide vectors")


def _cpu_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself. Without that, torch emulates it, often slower
    than float32."""
    if sys.platform == "darwin":
        return _sysctl("hw.optional.arm.FEAT_BF16") == "1"
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")):
    """The container's (cores, bytes), None where there is no limit.

    Limits may be set at any level, so the least of this process's group and all above it counts.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return None, None
    cores, sizes = [], []
    for line in lines:  # number:controllers:path, without controllers in version 2
        _, controllers, group = line.split(":", 2)
        mounts = [root / name for name in {controllers, *controllers.split(",")}]
        for mount in mounts:
            for folder in (mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents):
                quota, period = (_words(folder / "cpu.max") + ["", ""])[:2]  # version 2
                quota = quota or "".join(_words(folder / "cpu.cfs_quota_us"))
                period = period or "".join(_words(folder / "cpu.cfs_period_us"))
                if quota.isdigit() and period.isdigit() and int(period):  # else "max" or -1
                    cores.append(int(quota) / int(period))
                for name in ("memory.max", "memory.limit_in_bytes"):
                    limit = "".join(_words(folder / name))
                    if limit.isdigit() and int(limit) < 2**60:  # version 1 says "none" that way
                        sizes.append(int(limit))
                if folder == root:
                    break
    return min(cores, default=None), min(sizes, default=None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


# ---- tables -------------------------------------------------------------------------------------


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def text_table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def html_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    table = f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="course-table">{table}</div>'
