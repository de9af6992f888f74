"""The pipelines that people copy: complete, resumable, honest about what could not be read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from helpers import device, generated, measure, model, optimized, report


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six photographs in two classes, one of them broken."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(6):
        folder = root / "train" / f"n{number % 2:08}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(generated.jpeg(number))
    (root / "train" / "n00000000" / "broken.JPEG").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def settings(ray_session):
    model.weights()
    return device.recommend()


@pytest.fixture(scope="module")
def answered(photos, settings, tmp_path_factory):
    """The folder with the answers to all but one photograph, after a first run."""
    output = tmp_path_factory.mktemp("answers")
    result = optimized.run(str(photos), str(output), settings, limit=6)
    assert result == {"found": 6, "done": 0, "classified": 6}
    return output


def table(output):
    return pyarrow.parquet.read_table(output).to_pylist()


def test_every_image_has_one_row_and_a_broken_one_says_so(answered):
    rows = {Path(row["path"]).name: row for row in table(answered)}
    assert len(rows) == len(table(answered)) == 6
    assert "not a readable image" in rows["broken.JPEG"]["error"]
    assert rows["broken.JPEG"]["label"] == -1 and np.isnan(rows["broken.JPEG"]["logits"]).all()
    good = rows["0.JPEG"]
    assert good["error"] == "" and good["label"] == int(np.argmax(good["logits"]))


def test_answers_are_those_of_the_reference(answered, settings):
    answers, _ = measure.read_answers(answered)
    rows = {Path(row["path"]).name: row["path"] for row in table(answered)}
    path = rows["2.JPEG"]
    expected = model.reference_logits([path])[path]
    assert np.abs(answers[measure.short_key(path)] - expected).max() <= settings.tolerance


def test_a_second_run_does_what_is_missing_and_removes_what_a_crash_left(
    photos, answered, settings
):
    (answered / "half.parquet").write_bytes(b"PAR1 cut short")
    result = optimized.run(str(photos), str(answered), settings)
    assert result == {"found": 7, "done": 6, "classified": 1}
    paths = [row["path"] for row in table(answered)]
    assert len(paths) == len(set(paths)) == 7
    assert optimized.run(str(photos), str(answered), settings)["classified"] == 0


def test_files_of_something_else_are_left_alone(photos, settings, tmp_path):
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), other)
    with pytest.raises(optimized.OutputError, match="other.parquet.*choose another output"):
        optimized.run(str(photos), str(tmp_path), settings)
    assert other.exists()


def test_what_a_killed_run_left_undone_is_done_by_the_next_one(photos, settings, tmp_path):
    source, output = tmp_path / "photos", tmp_path / "answers"
    source.mkdir()
    for number in range(160):
        os.link(photos / "train" / "n00000000" / "0.JPEG", source / f"{number}.jpg")
    run = subprocess.Popen(
        [sys.executable, "-m", "helpers", "optimized", "--input", source, "--output", output],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def whole():
        """The files that are complete; at any moment the run may be in the middle of one."""
        files = [file for file in output.glob("*.parquet") if file.stat().st_size >= 12]
        return [file for file in files if file.read_bytes().endswith(b"PAR1")]

    while not whole():  # the test's timeout ends a wait in vain
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(2)  # until Ray has ended the workers of a driver that is gone
    finished = {file: file.stat().st_mtime_ns for file in whole()}
    result = optimized.run(str(source), str(output), settings)
    assert 0 < result["done"] < 160 and result["done"] + result["classified"] == 160
    paths = [row["path"] for row in table(output)]
    assert len(paths) == len(set(paths)) == 160
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())


def test_on_cpus_nothing_but_actors_runs_and_beside_a_gpu_the_cpus_decode(photos, settings):
    paths = optimized.list_images(str(photos))[1]
    assert measure.plan(optimized.pipeline(paths, settings)) == ["ReadBinary->MapBatches(Classify)"]
    gpu = device.recommend(
        device.Device(
            kind="cuda",
            cpu="",
            physical_cores=8,
            logical_cores=8,
            affinity_cores=8,
            cpu_quota=None,
            usable_cores=8,
            memory_bytes=32 * 10**9,
            simd="",
            cpu_bf16=False,
            gpus=(device.Gpu("test", 24 * 10**9, bf16=True, fp16=True),),
            cluster={"CPU": 8, "GPU": 1, "nodes": 1},
        )
    )
    assert measure.plan(optimized.pipeline(paths, gpu)) == [
        "ReadBinary->Map(prepare_row)",
        "MapBatches(Classify)",
    ]


def test_an_actor_builds_its_model_once(photos, settings):
    paths = optimized.list_images(str(photos))[1]
    run = measure.run(lambda: optimized.pipeline(paths, settings))
    assert run.rows == len(paths)
    assert 1 <= run.counter("model_constructions") <= settings.actors


def test_commands_say_what_is_wrong_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "helpers", "data"]
    environment = {"IMAGENETTE_DIR": str(tmp_path / "nowhere"), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*command, "--images", "-3"], capture_output=True, text=True)
    assert done.returncode == 2 and "not a whole number" in done.stderr


def numbers(name, **more):
    side = {
        "images": 8, "images_per_s": 1.0, "end_to_end_images_per_s": 1.0, "end_to_end_s": 8.0,
        "steady_images_per_s": 2.0, "first_answers_s": 3.0, "ray_ready_s": 4.0, "seconds": 4.0,
        "object_store_peak_bytes": 100_000_000, "spilled_bytes": 0, "worker_peak_bytes": 1e9,
    }  # fmt: skip
    return side | more


def test_the_report_states_the_ratios_and_is_one_file_without_network(tmp_path):
    agreement = {
        "images": 8, "same": 8, "tolerance": 1.0, "largest_difference": 0.1, "top1_same": 8,
        "clear": 6, "clear_top1_same": 6,
    }  # fmt: skip
    found = {
        "images": {"count": 8},
        "baseline": numbers("baseline"),
        "optimized": numbers(
            "optimized",
            images_per_s=12.0,
            end_to_end_images_per_s=6.0,
            steady_images_per_s=20.0,
            object_store_peak_bytes=5_000_000,
        ),
        "dataloader": {"images_per_s": 6.0, "steady_images_per_s": 16.0, "seconds": 2.0},
        "daft": None,
        "ceiling": {"together": 25.0},
        "agreement": {"baseline": agreement, "reference": agreement},
        "provenance": {
            "device": {"summary": "test device"},
            "versions": {"ray": "2", "torch": "2"},
            "images": {"description": "8 test images"},
            "weights": {"summary": "test weights"},
            "date": "2026-01-01T00:00",
            "commit": None,
        },
    }
    found["ratios"] = report.ratios(found)
    assert found["ratios"]["images_per_s"] == 12
    assert found["ratios"]["object_store_saved"] == pytest.approx(0.95)
    assert found["ratios"]["steady_vs_ceiling"] == pytest.approx(0.8)
    assert found["ratios"]["end_to_end_vs_dataloader"] == 1
    json.dumps(found)
    report.write(found, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "12.0x the baseline" in page and "http" not in page.replace("http-equiv", "")
    text = (tmp_path / "report.md").read_text()
    assert "95 % lower" in text and "(steady.png)" in text and (tmp_path / "steady.png").exists()


def test_a_first_class_is_compared_where_it_leads_clearly():
    """Where two classes are nearly equal, rounding decides; that is no wrong answer."""
    a = {"clear": np.array([3.0, 1.0, 0.0]), "close": np.array([3.0, 2.9, 0.0])}
    b = {"clear": np.array([2.9, 1.1, 0.0]), "close": np.array([2.9, 3.0, 0.0])}
    found = report._agreement(a, b, 0.5)
    assert (found["same"], found["top1_same"]) == (2, 1)
    assert (found["clear"], found["clear_top1_same"]) == (1, 1)
