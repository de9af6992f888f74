import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers import device, hardware

GB = 10**9
LAPTOP = device.Device(
    kind="cpu",
    cpu="Some CPU",
    physical_cores=2,
    logical_cores=2,
    affinity_cores=2,
    cpu_quota=None,
    usable_cores=2,
    memory_bytes=16 * GB,
    simd="AVX2",
    cpu_bf16=False,
)
H100 = device.Gpu("H100", 80 * GB, bf16=True, fp16=True)
T4 = device.Gpu("T4", 16 * GB, bf16=False, fp16=True)


def machine(cpus, gpus=0, gpu=H100, cluster=False, **changes):
    """A machine with so many usable cores and GPUs, on its own or seen through Ray."""
    found = replace(
        LAPTOP,
        kind="cuda" if gpus else "cpu",
        usable_cores=cpus,
        gpus=(gpu,) * gpus,
        memory_bytes=4 * GB * cpus,
    )
    if cluster:
        resources = {"CPU": float(cpus), "GPU": float(gpus), "accelerators": 1.0, "nodes": 1.0}
        found = replace(found, cluster=resources)
    return replace(found, **changes)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 192])
def test_the_actors_leave_room_for_tasks(cpus, gpus, cluster):
    settings = device.recommend(machine(cpus, gpus, cluster=cluster))
    per_actor = 1 if settings.cpus_per_actor is None else settings.cpus_per_actor
    assert settings.actors >= 1
    assert cpus - settings.actors * per_actor >= 1 - 1e-9, "no CPU left for the tasks"
    assert settings.decode_tasks <= cpus
    if gpus:
        assert settings.actors * settings.gpus_per_actor <= gpus
        assert settings.torch_device == "cuda"
    else:
        assert settings.gpus_per_actor is None
        assert settings.cpus_per_actor != 1, "equal CPUs fuse the preprocessing into the actor"
        assert settings.actors <= cpus


def test_more_free_cpus_on_request():
    for cpus in (2, 3, 4, 16):
        settings = device.recommend(machine(cpus), free_cpus=2)
        assert cpus - settings.actors * settings.cpus_per_actor >= 2 - 1e-9


def test_each_setting_has_its_reason():
    for found in (machine(2), machine(16, 4), machine(2, 1), replace(LAPTOP, kind="mps")):
        settings = device.recommend(found)
        values = set(settings.to_dict()) - {"reasons"}
        assert set(settings.reasons) == values
        assert all(reason.endswith(".") for reason in settings.reasons.values())
        for name in values:
            assert name in str(settings) and name in settings._repr_html_()


def test_precision_follows_the_instructions():
    assert device.recommend(machine(2)).precision == "float32"
    assert device.recommend(machine(2, cpu_bf16=True)).precision == "bfloat16"
    # A GPU decides for itself, whatever the CPU can do.
    assert device.recommend(machine(8, 1)).precision == "bfloat16"
    assert device.recommend(machine(8, 1, gpu=T4, cpu_bf16=True)).precision == "float16"


def test_a_batch_fills_a_gpu_and_stays_small_on_a_cpu():
    assert device.recommend(machine(2)).batch_size <= 16
    assert device.recommend(machine(8, 1)).batch_size >= 64
    # A slow core gets small blocks: answers come a block at a time.
    fast = device.recommend(machine(2, cpu_bf16=True))
    assert device.recommend(machine(2)).images_per_block < fast.images_per_block
    # To a GPU the blocks come from tasks, which decode.
    assert fast.images_per_block < device.recommend(machine(8, 1)).images_per_block


def test_little_memory_means_fewer_replicas():
    assert device.recommend(machine(16, memory_bytes=8 * GB)).actors < 16


def test_a_few_images_need_no_replica_for_each_core():
    assert device.recommend(machine(8), images=24).actors == 1
    assert "24" in device.recommend(machine(8), images=24).reasons["actors"]
    assert device.recommend(machine(8), images=10_000).actors == 8
    assert device.recommend(machine(8, 2), images=1).actors == 2  # a GPU is not left idle


def test_a_cluster_counts_more_than_this_machine():
    found = machine(2, cluster=True)
    cluster = found.cluster | {"CPU": 64.0, "GPU": 8.0, "nodes": 8.0}
    settings = device.recommend(replace(found, kind="cuda", cluster=cluster))
    assert (settings.torch_device, settings.actors, settings.gpus_per_actor) == ("cuda", 8, 1)


def test_detect_describes_this_machine():
    found = device.detect()
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.memory_bytes > 2**28
    assert found.kind in ("cpu", "cuda", "mps")
    assert found.cpu in str(found) and found.cpu in found._repr_html_()
    record = found.to_dict()
    assert record["summary"] == found.summary
    assert record["native_bf16"] == found.native_bf16


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_container_limits_version_2(tmp_path):
    write(tmp_path / "process", "0::/pod/job\n")
    root = tmp_path / "cgroup"
    write(root / "pod/cpu.max", "150000 100000\n")
    write(root / "pod/job/cpu.max", "max 100000\n")
    write(root / "pod/job/memory.max", "2147483648\n")
    assert hardware.cgroup_limits(root, tmp_path / "process") == (1.5, 2**31)


def test_container_limits_version_1(tmp_path):
    write(tmp_path / "process", "9:name=systemd:/\n4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n")
    root = tmp_path / "cgroup"
    # Inside a container the process's group is mounted as the root.
    write(root / "cpu/cpu.cfs_quota_us", "400000\n")
    write(root / "cpu/cpu.cfs_period_us", "100000\n")
    write(root / "memory/docker/x/memory.limit_in_bytes", "1073741824\n")
    write(root / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert hardware.cgroup_limits(root, tmp_path / "process") == (4.0, 2**30)


def test_no_container_limits(tmp_path):
    write(tmp_path / "process", "1:cpu:/\n0::/\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert hardware.cgroup_limits(tmp_path / "cgroup", tmp_path / "process") == (None, None)
    assert hardware.cgroup_limits(tmp_path, tmp_path / "absent") == (None, None)


def test_a_quota_below_the_visible_cores_warns(monkeypatch):
    monkeypatch.setattr(hardware, "cgroup_limits", lambda: (0.5, 2**31))
    found = device.detect()
    assert found.usable_cores == 1
    assert found.memory_bytes == 2**31
    assert any("0.5" in warning for warning in found.warnings)
    assert "0.5" in str(found)


PIPELINE = """
import numpy as np
from helpers import device
device.start_ray(num_cpus=2)
device.start_ray(num_cpus=2)
import ray
from ray.data import ActorPoolStrategy, DataContext

class Model:
    def __init__(self, offset):
        self.offset = offset
    def __call__(self, batch):
        return {"id": batch["id"] + self.offset}

rows = ray.data.range(64).map_batches(
    Model, fn_constructor_args=(np.zeros(1),), compute=ActorPoolStrategy(size=2), num_cpus=0.5,
    batch_size=8,
)
assert len(rows.take_all()) == 64
assert rows.materialize().count() == 64
context = DataContext.get_current()
assert context.execution_no_progress_timeout_s == 60
session = ray.get_runtime_context().get_session_name()
device.start_ray(num_cpus=2)
assert ray.get_runtime_context().get_session_name() == session, "the same call restarted Ray"
device.start_ray(num_cpus=3, num_gpus=1)
assert ray.cluster_resources()["CPU"] == 3 and ray.cluster_resources()["GPU"] == 1
if device.detect().gpus == ():
    assert device.recommend().torch_device != "cuda", "a declared GPU was taken for a real one"
import logging
logging.getLogger("ray.data").warning("a real warning")
"""


def test_ray_starts_and_runs_without_a_word():
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1 and "a real warning" in lines[0], "\n".join(lines)


@pytest.mark.parametrize(
    ("reports", "seconds", "shown"), [([{}, {}, {"CPU": 1.0}], 60, 0), ([{}], 0.1, 1)]
)
def test_ray_data_warns_of_no_free_cpus_only_if_it_stays_so(
    ray_session, monkeypatch, reports, seconds, shown
):
    records, log = [], logging.getLogger("ray.data.dataset")
    handler = logging.Handler()
    handler.emit = records.append
    waits = device._wait_for_free_cpus
    monkeypatch.setattr(device, "_wait_for_free_cpus", lambda **_: waits(seconds))
    monkeypatch.setattr(
        ray_session,
        "available_resources",
        lambda: reports.pop(0) if len(reports) > 1 else reports[0],
    )
    log.addHandler(handler)
    try:
        log.warning("The Ray cluster currently does not have any available CPUs.")
        log.warning("something else")
    finally:
        log.removeHandler(handler)
    assert len(records) == shown + 1


def test_a_cluster_with_a_token_is_joined_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # monkeypatch restores it
    monkeypatch.delenv("RAY_AUTH_MODE")
    device._quiet_environment(quiet=True, starts=False)
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    device._quiet_environment(quiet=True, starts=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
