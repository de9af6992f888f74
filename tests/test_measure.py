"""A run's counters are what the pipeline did; no test looks at a clock."""

import time

import numpy as np
import pytest
from ray.data import DataContext

from helpers import events, measure
from helpers.events import counted

N = 20


@pytest.fixture
def rows(ray_session):
    def make(blocks: int = 4):
        items = [{"path": f"somewhere/train/n01/{i}.JPEG", "logits": [i, 0.0]} for i in range(N)]
        return ray_session.data.from_items(items, override_num_blocks=blocks)

    return make


@counted
def same(row):
    return row


def test_rows_and_answers_are_matched_by_image(rows):
    run = measure.run(lambda: rows().map(same))
    assert run.rows == N
    assert run.answers["n01/7.JPEG"].tolist() == [7, 0]
    assert run.counter("duplicate_rows") == 0


def test_calls_are_counted_in_the_workers(rows):
    run = measure.run(lambda: rows().map(same))
    assert run.counter("calls:same") == N
    again = measure.run(lambda: rows())
    assert again.counter("calls:same") == 0, "a run sees its own events only"


def test_every_execution_counts(rows):
    def three_times():
        mapped = rows().map_batches(lambda batch: batch)
        mapped.count()  # behind a `map` it would be answered from the number of files
        mapped.take(1)
        return mapped

    assert measure.run(three_times).counter("executions") == 3
    assert measure.run(lambda: rows().map_batches(lambda batch: batch)).counter("executions") == 1


def test_a_dataset_made_before_anything_was_observed_is_seen_as_well(rows):
    context = DataContext.get_current()
    watching, context.custom_execution_callback_classes = (
        context.custom_execution_callback_classes,
        [],
    )
    try:
        made_before = rows().map(same)
    finally:
        context.custom_execution_callback_classes = watching
    run = measure.run(lambda: made_before)
    assert run.counter("executions") == 1
    assert run.counter("rows") == N


def test_operators_tell_fusion_tasks_rows_and_bytes(rows):
    def pixels(batch):
        return {"path": batch["path"], "logits": np.zeros((len(batch["path"]), 1000), np.float32)}

    run = measure.run(lambda: rows().map(same).map_batches(pixels))
    (fused,) = run.operators
    assert fused.name == "Map(same)->MapBatches(pixels)"
    assert (fused.tasks, fused.rows, fused.actors) == (4, N, False)
    assert run.counter("bytes_out:pixels") >= N * 4000
    split = measure.run(lambda: rows().map(same, num_cpus=0.5).map_batches(pixels))
    assert split.counter("operators") == 2
    assert split.counter("operators:->") == 0


def test_actor_pools_are_told_from_tasks(rows, ray_session):
    class Model:
        def __init__(self):
            events.emit("model_constructions")

        def __call__(self, batch):
            events.emit(f"batch_size:{len(batch['path'])}")
            return batch

    def pipeline():
        pool = ray_session.data.ActorPoolStrategy(size=1)
        return rows(blocks=1).map_batches(Model, batch_size=8, compute=pool, num_cpus=0.5)

    run = measure.run(pipeline)
    assert run.counter("model_constructions") == 1
    assert run.batch_sizes == {4: 1, 8: 2}
    assert run.counter("actor_operators") == 1 and run.counter("replicas_asked") == 1
    assert run.counter("bytes_from_model") > 0


def test_cpu_time_is_that_of_who_used_it(rows, ray_session):
    class Busy:
        def __call__(self, batch):
            end = time.process_time() + 1
            while time.process_time() < end:
                pass
            return batch

    def pipeline():
        pool = ray_session.data.ActorPoolStrategy(size=1)
        return rows(blocks=2).map_batches(Busy, batch_size=N, compute=pool, num_cpus=0.5)

    last = measure.run(pipeline).samples[-1].cpu_s
    assert set(last) == set(measure.ROLES)
    assert last["actors"] > 1.5  # two blocks; the last moments can be missing
    assert last["driver"] > 0


def test_written_files_are_read_back_and_counted(rows, tmp_path):
    def write():
        rows().write_parquet(tmp_path / "out")
        return tmp_path / "out"

    run = measure.run(write)
    assert run.rows == N
    assert run.counter("files_written") == len(list((tmp_path / "out").glob("*.parquet"))) >= 1
    assert min(run.files_written) > 0


def test_plan_reads_the_physical_operators(rows):
    dataset = rows().map(same).map_batches(lambda batch: batch, num_cpus=0.5)
    assert [name.split("(")[0] for name in measure.plan(dataset)][-2:] == ["Map", "MapBatches"]


def test_a_wrong_return_value_is_named(ray_session):
    with pytest.raises(TypeError, match="returned int"):
        measure.run(lambda: 3)
    with pytest.raises(KeyError, match="no column 'logits'"):
        measure.run(lambda: [{"path": "a/b", "label": 1}])


def test_an_unknown_counter_names_the_known_ones(rows):
    with pytest.raises(KeyError, match="model_constructions"):
        measure.run(rows).counter("model_constructoins")


def test_events_survive_a_cut_line(tmp_path, monkeypatch):
    (tmp_path / "1.tsv").write_text("a\t2\na\t1\nb\t")
    assert events._read(tmp_path) == {"a": 3}


def test_a_run_begins_when_the_one_before_has_let_go_of_its_cpus(rows, ray_session):
    import gc

    class Slow:
        def __call__(self, batch):
            time.sleep(0.5)
            return batch

    gc.disable()  # so that only `settle` can end what an early stop leaves behind
    try:
        pool = ray_session.data.ActorPoolStrategy(size=2)
        rows(10).map_batches(Slow, batch_size=2, compute=pool, num_cpus=0.4).take(1)
        measure.settle(seconds=10)
        free = ray_session.available_resources()["CPU"]
    finally:
        gc.enable()
    assert free == ray_session.cluster_resources()["CPU"]


def test_watching_keeps_no_execution_that_has_ended(rows):
    """It would keep an actor of one that was stopped early, and the next might wait for its CPU."""
    import gc

    alive = []

    def several():
        rows().take_all()
        rows().take_all()
        rows().take_all()
        kinds = [type(thing).__name__ for thing in gc.get_objects()]
        alive.append(kinds.count("StreamingExecutor"))
        return rows()

    run = measure.run(several)
    assert run.counter("executions") == 4 and run.rows == N
    assert alive == [1], "the last one, until another starts"
