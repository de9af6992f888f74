"""The doctor finds planted mistakes and gives healthy pipelines a clean bill.

No test looks at a clock. Each pipeline runs for real, on tiny data: what the
plan proves has no floor, and what only counts in bulk has one, which the planted data exceeds.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet50_Weights, resnet18

from helpers import __main__ as cli
from helpers import doctor
from helpers.catalog import MISTAKES
from helpers.doctor import functions, observe, rules
from helpers.s3_server import S3Server


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 JPEGs in two classes and three shapes."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for i in range(24):
        height, width = ((240, 320), (320, 240), (200, 200))[i % 3]
        pixels = noise.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        folder = root / f"n{i % 4:02d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.JPEG")
    return str(root)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Parquet: a key, a number, a label, and wide columns that nobody needs."""
    root = tmp_path_factory.mktemp("table")
    for part in range(2):
        columns = {f"wide_{i}": np.random.rand(400) for i in range(20)}
        frame = pd.DataFrame({"id": range(400), "x": np.random.rand(400), "label": "a", **columns})
        frame.to_parquet(root / f"{part}.parquet")
    return str(root)


@pytest.fixture(scope="module")
def ray(ray_session):
    # Ray starts 32 actors to read Parquet footers; here one is enough.
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    yield ray_session
    del os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"]


def look(pipeline) -> doctor.Diagnosis:
    with doctor.watch() as seen:
        pipeline()
    return seen.diagnosis()


def decode(row):
    image = Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize((96, 96))
    return {"path": row["path"], "image": np.asarray(image)}


def small(row):
    row["image"] = np.asarray(Image.fromarray(row["image"]).resize((96, 96)))
    return row


class Model:
    """Stands for a classifier: builds something once, returns the key and a label."""

    def __init__(self):
        self.weights = np.ones((3, 5))

    def __call__(self, batch):
        scores = batch["image"].mean(axis=(1, 2)) @ self.weights
        return {"path": batch["path"], "label": scores.argmax(1)}


class CarryingModel(Model):
    def __call__(self, batch):
        batch = dict(batch)
        batch["label"] = (batch["image"].mean(axis=(1, 2)) @ self.weights).argmax(1)
        return batch


class IdModel:
    def __call__(self, batch):
        return {"id": batch["id"], "y": batch["id"] % 7}


def build_model():
    return np.ones((1, 3))


# ---- planted ------------------------------------------------------------------------------------

PLANTED = {}


def planted(*ids):
    def register(function):
        PLANTED[function.__name__] = ids, function
        return function

    return register


def pool(ray, **sizes):
    return ray.data.ActorPoolStrategy(**(sizes or {"size": 1}))


@planted("I1")
def keeps_one_class(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(32, 32), mode="RGB", include_paths=True)
    ds = ds.filter(lambda row: "/n01/" in row["path"])
    ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}).write_parquet(out)


@planted("T7", "I2", "I3", "T5", "O5")
def everything_in_the_actor(ray, photos, table, out):
    ds = ray.data.read_images(photos, mode="RGB", include_paths=True).map(small)
    ds = ds.map_batches(CarryingModel, batch_size=8, compute=pool(ray))
    ds.write_parquet(out)


@planted("I1")
def keeps_one_class_of_the_answers(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode)
    ds = ds.map_batches(Model, batch_size=8, num_cpus=0.5, compute=pool(ray))
    ds.filter(lambda row: "/n01/" in row["path"]).write_parquet(out)


@planted("I1")
def keeps_one_class_by_an_expression(ray, photos, table, out):
    from ray.data.expressions import col

    ds = ray.data.read_images(photos, size=(32, 32), mode="RGB", include_paths=True)
    ds = ds.filter(expr=col("path").str.match_regex("/n01/"))
    ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}).write_parquet(out)


@planted("I4")
def all_columns_for_a_filter_and_one_of_them(ray, photos, table, out):
    ds = ray.data.read_parquet(table).filter(lambda row: row["x"] >= 0).select_columns(["id"])
    ds.write_parquet(out)


@planted("I4")
def filter_as_a_function(ray, photos, table, out):
    ray.data.read_parquet(table).filter(lambda r: r["x"] > 0.9).write_parquet(out)


@planted("I4")
def filter_as_a_map(ray, photos, table, out):
    ds = ray.data.read_parquet(table)
    ds.map_batches(frame_mask, batch_format="pandas").write_parquet(out)


@planted("I4")
def all_columns(ray, photos, table, out):
    ds = ray.data.read_parquet(table)
    ds.map_batches(lambda b: {"id": b["id"], "y": b["x"] * 2}).write_parquet(out)


@planted("I6", "O1")
def far_too_many_blocks(ray, photos, table, out):
    ds = ray.data.range(200, override_num_blocks=60)
    ds.map_batches(lambda b: {"y": b["id"] + 1}).write_parquet(out)


@planted("I7")
def one_block(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", override_num_blocks=1)
    ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}).write_parquet(out)


@planted("I8", "I3")
def materialized_in_the_middle(ray, photos, table, out):
    ds = ray.data.read_images(photos).materialize()
    ds.map(lambda row: {"mean": row["image"].mean()}).write_parquet(out)


@planted("I8")
def pixels_collected(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(160, 160), mode="RGB")
    ds.map_batches(lambda b: {"image": 255 - b["image"]}).take_all()


@planted("I9")
def counted_collected_written(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(lambda b: {"y": b["id"] * 2})
    ds.count()
    ds.take_all()
    ds.write_parquet(out)


@planted("I10")
def fraction_for_a_read_that_decodes(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", num_cpus=0.1)
    ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}).write_parquet(out)


@planted("I11")
def made_up_rows(ray, photos, table, out):
    def decode_or_black(row):
        try:
            return decode(row)
        except Exception:
            return {"path": row["path"], "image": np.zeros((96, 96, 3), np.uint8)}

    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode_or_black)
    ds.map(lambda row: {"mean": row["image"].mean()}).write_parquet(out)


@planted("T1")
def numbers_row_by_row(ray, photos, table, out):
    ds = ray.data.range(6000, override_num_blocks=4)
    ds.map(lambda row: {"y": row["id"] * 0.5 + 1}).write_parquet(out)


@planted("T2")
def model_in_the_function(ray, photos, table, out):
    def predict(batch):
        model = build_model()
        return {"y": (batch["id"][:, None] @ model).sum(axis=1)}

    ray.data.range(100).map_batches(predict, batch_size=10).write_parquet(out)


@planted("T3")
def batch_of_one(ray, photos, table, out):
    ds = ray.data.range(40, override_num_blocks=2)
    ds.map_batches(IdModel, batch_size=1, compute=pool(ray)).write_parquet(out)


@planted("T4")
def floats_shipped(ray, photos, table, out):
    def normalize(batch):
        return {"path": batch["path"], "image": (batch["image"] / 255).astype(np.float32)}

    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds = ds.map_batches(normalize, batch_size=8)
    ds.map_batches(Model, batch_size=8, num_cpus=0.9, compute=pool(ray)).write_parquet(out)


@planted("T6")
def split_by_accident(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode)
    ds.map(lambda row: {"mean": row["image"].mean()}, num_cpus=0.5).write_parquet(out)


class Mirror:
    def __call__(self, batch):
        return {"path": batch["path"], "image": batch["image"][:, :, ::-1]}


@planted("T6")
def an_actor_that_keeps_nothing(ray, photos, table, out):
    def large(row):
        return {"path": row["path"], "image": np.repeat(decode(row)["image"], 3, axis=0)}

    ds = ray.data.read_binary_files(photos, include_paths=True).map(large)
    ds.map_batches(Mirror, batch_size=8, num_cpus=0.5, compute=pool(ray)).write_numpy(
        out, column="image"
    )


@planted("T8")
def pandas_for_tensors(ray, photos, table, out):
    def mean(frame):
        frame["mean"] = np.stack(frame["image"].to_list()).mean(axis=(1, 2, 3))
        return frame[["mean"]]

    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB")
    ds.map_batches(mean, batch_format="pandas", batch_size=8).write_parquet(out)


@planted("T8")
def pandas_behind_a_decoding_map(ray, photos, table, out):
    def mean(frame):
        means = np.stack([np.asarray(image) for image in frame["image"]]).mean(axis=(1, 2, 3))
        frame = frame[["path"]].copy()
        frame["mean"] = means
        return frame

    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode)
    ds.map_batches(mean, batch_format="pandas", batch_size=8).write_parquet(out)


@planted("T10")
def big_closure(ray, photos, table, out):
    weights = np.random.rand(300_000)
    ray.data.range(50).map_batches(lambda b: {"y": weights[b["id"]]}).write_parquet(out)


@planted("R10")
def order_for_files(ray, photos, table, out):
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    try:
        ray.data.range(100).map_batches(lambda b: {"y": b["id"] * 2}).write_parquet(out)
    finally:
        context.execution_options.preserve_order = False


@planted("O2")
def one_file(ray, photos, table, out):
    def noise(batch):
        return {"id": batch["id"], "y": np.random.rand(len(batch["id"]), 2000)}

    ray.data.range(100, override_num_blocks=4).map_batches(noise).repartition(1).write_parquet(out)


@planted("O3", "O8")
def written_by_the_driver(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(IdModel, batch_size=25, compute=pool(ray)).materialize()
    ds.count()
    pd.DataFrame(ds.map_batches(lambda b: b).take_all()).to_csv(f"{out}.csv")
    ds = ray.data.range(100).map_batches(IdModel, batch_size=50, compute=pool(ray))
    ds.random_shuffle().write_parquet(out)


@planted("I9", "O3")
def collected_then_written(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(IdModel, batch_size=25, compute=pool(ray))
    ds.to_pandas().to_csv(f"{out}.csv")  # small enough for pandas; the second run is the mistake
    ds.write_parquet(out)


class SlowIdModel(IdModel):
    def __call__(self, batch):
        time.sleep(0.05 * len(batch["id"]))  # work that nobody should want to do again
        return super().__call__(batch)


@planted("I7", "I9")
def a_look_that_ran_the_model_over_everything(ray, photos, table, out):
    ds = ray.data.range(24, override_num_blocks=1)
    ds = ds.map_batches(SlowIdModel, batch_size=8, compute=pool(ray))
    ds.take_batch(2)
    ds.write_parquet(out)


@planted("I8", "T5")
def pixels_kept_for_nobody(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(160, 160), mode="RGB", include_paths=True)
    ds.map_batches(CarryingModel, batch_size=8, num_cpus=0.9, compute=pool(ray)).materialize()


class PassesObjects(Model):
    def __call__(self, batch):
        pixels = np.stack([np.asarray(image) for image in batch["pil"]])
        batch["label"] = (pixels.mean(axis=(1, 2)) @ self.weights).argmax(1)
        return batch


@planted("T5")
def objects_passed_through_the_model(ray, photos, table, out):
    def opened(row):
        image = Image.fromarray(decode(row)["image"])
        return {"path": row["path"], "pil": image}

    ds = ray.data.read_binary_files(photos, include_paths=True).map(opened)
    ds = ds.map_batches(PassesObjects, batch_size=8, num_cpus=0.9, compute=pool(ray))
    ds.take_all()


@planted("O3")
def vectors_written_by_pandas(ray, photos, table, out):
    def embed(batch):
        return {"id": batch["id"], "vector": np.ones((len(batch["id"]), 64))}

    ds = ray.data.range(100).map_batches(embed, batch_size=25)
    ds.to_pandas().to_pickle(f"{out}.pkl")


@planted("O3")
def vectors_saved_by_the_driver(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(lambda b: {"vector": np.ones((len(b["id"]), 64))})
    vectors = [batch["vector"] for batch in ds.iter_batches(batch_size=25)]
    np.save(f"{out}.npy", np.concatenate(vectors))


@planted("T1", "T8", "T9", "O4")
def as_other_people_write_them(ray, photos, table, out):
    steps = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()])

    def brightness(row):
        image = Image.fromarray(row["image"])
        total = 0
        for y in range(8):
            for x in range(8):
                total += image.getpixel((x, y))[0]
        return {"image": steps(row["image"]).numpy(), "total": total}

    def vectors(frame):
        pixels = np.stack([np.asarray(p) for p in frame["image"]])
        return pd.DataFrame({"vector": [" ".join(map(str, p.ravel()[:20])) for p in pixels]})

    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB").map(brightness)
    ds.map_batches(vectors, batch_format="pandas", batch_size=8).write_csv(out)


@planted("I1", "I2", "I3")
def pixels_behind_a_filter(ray, photos, table, out):
    def mean(batch):
        return {"mean": np.array([image.mean() for image in batch["image"]])}

    ds = ray.data.read_images(photos, mode="RGB", include_paths=True)
    ds = ds.filter(lambda row: "n01" in row["path"] or "n02" in row["path"])
    ds.map_batches(mean, batch_size=8).write_parquet(out)


@planted("O4")
def arrays_as_text(ray, photos, table, out):
    def embed(batch):
        return {"id": batch["id"], "vector": np.random.rand(len(batch["id"]), 64)}

    ray.data.range(40).map_batches(embed).write_json(out)


@planted("O6")
def a_folder_per_row(ray, photos, table, out):
    ds = ray.data.range(60).map_batches(lambda b: {"user": b["id"] % 30, "y": b["id"]})
    ds.write_parquet(out, partition_cols=["user"])


@planted("O7")
def run_twice(ray, photos, table, out):
    for _ in range(2):
        ray.data.range(50).write_parquet(out)


@planted("O7")
def a_trial_and_then_all(ray, photos, table, out):
    files = sorted(f"{folder}/{name}" for folder, _, names in os.walk(photos) for name in names)
    for some in (files[:10], files):
        ray.data.read_binary_files(some, include_paths=True).map(decode).map_batches(
            lambda b: {"path": b["path"], "mean": b["image"].mean(axis=(1, 2, 3))}, batch_size=8
        ).write_parquet(out, min_rows_per_file=24)


@planted("O7")
def a_trial_in_the_folder_of_the_run(ray, photos, table, out):
    ds = (
        ray.data.read_binary_files(photos, include_paths=True)
        .map(decode)
        .map_batches(
            lambda b: {"path": b["path"], "mean": b["image"].mean(axis=(1, 2, 3))}, batch_size=8
        )
    )
    ds.limit(5).write_parquet(out)
    ds.write_parquet(out)


@planted("O7")
def a_trial_of_items(ray, photos, table, out):
    items = [{"path": f"{i}.jpeg"} for i in range(23)]
    for some in (items[:5], items):
        ray.data.from_items(some).map(lambda row: row | {"y": 1}).write_json(out)


class Measures:
    @staticmethod
    def sharpness(gray):
        total = 0.0
        for y in range(1, 20):
            for x in range(1, 20):
                total += float(gray[y, x]) - float(gray[y - 1, x])
        return total

    @classmethod
    def of_row(cls, row):
        try:
            return {"y": cls.sharpness(decode(row)["image"][..., 0])}
        except Exception:
            return {"y": 0.0}


@planted("T1", "I11")
def a_class_method_that_calls_another(ray, photos, table, out):
    ray.data.read_binary_files(photos, include_paths=True).map(Measures.of_row).write_parquet(out)


def spread(image):
    total = 0.0
    for y in range(20):
        for x in range(20):
            total += float(image[y, x, 0]) ** 2
    return total


@planted("I7", "T1")
def one_table_of_paths(ray, photos, table, out):
    def load(frame):
        pixels = [np.asarray(Image.open(p).convert("RGB").resize((160, 160))) for p in frame.path]
        return frame.assign(image=pixels)

    def measure(frame):
        return frame.assign(y=frame.image.apply(spread))

    files = [f"{folder}/{name}" for folder, _, names in os.walk(photos) for name in names]
    ds = ray.data.from_pandas(pd.DataFrame({"path": files}))
    ds = ds.map_batches(load, batch_format="pandas", batch_size=8)
    ds = ds.map_batches(measure, batch_format="pandas", batch_size=8)
    ds.map_batches(Model, batch_size=8, num_cpus=0.5, compute=pool(ray)).write_parquet(out)


def black_images(batch):
    n = len(batch["id"])
    return {"path": batch["id"], "image": np.zeros((n, 224, 224, 3), np.uint8)}


@planted("R7")
def a_batch_of_many_images(ray, photos, table, out):
    ds = ray.data.range(130, override_num_blocks=2).map_batches(black_images, batch_size=65)
    ds = ds.map_batches(Model, batch_size=128, num_cpus=0.5, compute=pool(ray))
    ds.write_parquet(out, min_rows_per_file=1000)


@planted("R7", "T3")
def a_batch_of_a_whole_block(ray, photos, table, out):
    ds = ray.data.from_pandas(pd.DataFrame({"id": range(130)})).map_batches(
        black_images, batch_size=65
    )
    ds.map_batches(Model, batch_size=None, num_cpus=0.5, compute=pool(ray)).write_parquet(out)


@planted("I7", "T3", "R9")
def one_block_and_three_models(ray, photos, table, out):
    ds = ray.data.range(130, override_num_blocks=1).map_batches(black_images, batch_size=65)
    ds = ds.map_batches(Model, batch_size=None, num_cpus=0.2, compute=pool(ray, size=3))
    ds.write_parquet(out)


@planted("R7", "T3", "I8")
def a_batch_of_everything_that_is_kept(ray, photos, table, out):
    kept = ray.data.range(130).map_batches(black_images, batch_size=65).materialize()
    kept.map_batches(Model, batch_size=256, num_cpus=0.5, compute=pool(ray)).write_parquet(out)


@planted("T3")
def a_method_without_a_batch_size(ray, photos, table, out):
    def images(batch):
        n = len(batch["id"])
        return {"path": batch["id"], "image": np.zeros((n, 96, 96, 3), np.uint8)}

    halves = [pd.DataFrame({"id": range(65)}) for _ in range(2)]
    ds = ray.data.from_pandas(halves).map_batches(images)
    ds.map_batches(Model().__call__).write_parquet(out)


class TorchModel(Model):
    def __call__(self, batch):
        if len(batch["path"]) > 1000:  # it stands in the code: five processes need not import it
            import torch

            torch.set_num_threads(1)
        return super().__call__(batch)


@planted("R9")
def more_models_than_cores(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(32, 32), mode="RGB", include_paths=True)
    ds = ds.map_batches(TorchModel, batch_size=4, num_cpus=0.1, compute=pool(ray, size=3))
    ds.write_parquet(out, min_rows_per_file=1000)


@planted("R10", "T4")
def floats_shuffled_for_a_function(ray, photos, table, out):
    net = torch.nn.Conv2d(3, 1, 3)

    def load(row):
        image = Image.open(row["path"]).convert("RGB").resize((64, 64))
        return {"path": row["path"], "x": np.asarray(image, np.float32).transpose(2, 0, 1)}

    def step(batch):
        with torch.inference_mode():
            return {"path": batch["path"], "y": net(torch.tensor(batch["x"])).mean((1, 2, 3))}

    files = [f"{folder}/{name}" for folder, _, names in os.walk(photos) for name in names]
    rows = ray.data.from_items([{"path": file} for file in files]).map(load)
    rows.random_shuffle(seed=1).map_batches(step, batch_size=8).write_parquet(out)


@planted("R3", "R4")
def waits_forever(ray, photos, table, out):
    held = ray.data.range(10).map_batches(IdModel, batch_size=5, compute=pool(ray, size=2))
    assert "R4" in doctor.diagnose(held).ids
    ds = ray.data.range(10).map_batches(IdModel, batch_size=5, num_gpus=1, compute=pool(ray))
    for pipeline in (ds, ray.data.range(10).map_batches(lambda b: b, num_cpus=0.5)):
        pipeline = pipeline.map_batches(IdModel, batch_size=5, compute=pool(ray, size=2))
        with pytest.raises(Exception, match="could not go on"):
            pipeline.write_parquet(out)


@planted("T1")
def loops_over_numbers(ray, photos, table, out):
    ds = ray.data.range_tensor(100, shape=(64,))
    ds = ds.map_batches(lambda b: {"vector": b["data"]}, num_cpus=0.5)
    ds.map_batches(squares_by_hand, num_cpus=2).write_parquet(out)


@planted("T1", "I4")
def numbers_of_a_list_behind_a_filter(ray, photos, table, out):
    def norm(row):
        return {"id": row["id"], "y": sum(value * value for value in row["vector"]) ** 0.5}

    rows = [{"id": i, "vector": list(np.random.rand(64))} for i in range(400)]
    os.makedirs(out + "-in")
    pd.DataFrame(rows).to_parquet(out + "-in/rows.parquet")
    ds = ray.data.read_parquet(out + "-in").filter(lambda row: row["id"] < 200)
    ds.map(norm).write_json(out)


@planted("R10")
def shuffled_before_it_was_kept(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds = ds.random_shuffle().materialize()
    ds.map_batches(Model, batch_size=8, compute=pool(ray)).write_parquet(out)


@planted("R10")
def pixels_in_a_random_order(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(128, 128), mode="RGB", include_paths=True)
    ds = ds.random_shuffle()
    ds.map(lambda row: {"path": row["path"], "y": row["image"].mean()}).write_parquet(out)


@planted("I2")
def sized_pixels_for_a_few_numbers(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(200, 200), mode="RGB", include_paths=True)
    ds.map_batches(lambda b: {"y": b["image"].mean(axis=(1, 2, 3))}, batch_size=8).write_parquet(
        out
    )


@planted("R10", "T8")
def pixels_sorted(ray, photos, table, out):
    def brightness(frame):
        return pd.DataFrame({"path": frame["path"], "y": [i.mean() for i in frame["image"]]})

    ds = ray.data.read_binary_files(photos, include_paths=True)
    ds = ds.map(lambda r: {**decode(r), "image": np.tile(decode(r)["image"], (2, 2, 1))})
    ds.sort("path").map_batches(brightness, batch_format="pandas").write_parquet(out)


@planted("T4")
def floats_kept(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds = ds.map_batches(lambda b: {**b, "image": np.float32(b["image"])}).materialize()
    ds.map_batches(Model, batch_size=8, compute=pool(ray)).write_parquet(out)


@planted("T4")
def floats_from_a_parquet_file(ray, photos, table, out):
    rows = [{"id": i, "image": np.zeros((64, 64, 3), np.uint8)} for i in range(16)]
    ray.data.from_items(rows).write_parquet(out + "-in")
    ds = ray.data.read_parquet(out + "-in")
    ds = ds.map_batches(lambda b: {"id": b["id"], "image": np.float32(b["image"]) / 255})
    ds.map_batches(IdModel, batch_size=8, compute=pool(ray), num_cpus=0.5).write_parquet(out)


@planted("T1")
def three_numbers_at_a_time(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds.map(luminance).materialize()


def luminance(row):
    total = 0.0
    for line in row["image"][::2, ::2].tolist():
        for r, g, b in line:
            total += 0.3 * r + 0.6 * g + 0.1 * b
    row["luminance"] = total
    return row


@planted("I7")
def one_row_group(ray, photos, table, out):
    files = ray.data.read_binary_files(photos, include_paths=True).take_all()
    os.makedirs(out + "-in")
    pd.DataFrame(files).to_parquet(out + "-in/all.parquet")
    ds = ray.data.read_parquet(out + "-in").map(decode)
    ds.map_batches(Model, batch_size=8, compute=pool(ray)).write_parquet(out)
    shutil.rmtree(out + "-in")  # a temporary file: gone when the doctor comes to a conclusion


class Matcher:
    """An object, not a class: it travels to every task, with all that it holds."""

    def __init__(self):
        self.vectors = torch.ones(300_000, 2)

    @property
    def backbone(self):
        return make_backbone()

    def __call__(self, batch):
        means = torch.tensor(batch["image"].mean(axis=(1, 2)), dtype=torch.float32)
        scores = self.backbone(means).detach() @ self.vectors[:2]
        return {"path": batch["path"], "label": scores.argmax(1).numpy()}


@planted("T2", "T10", "T11")
def an_object_that_makes_its_model_in_a_property(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds.map_batches(Matcher(), batch_size=8).write_parquet(out)


class OneByOne:
    def __init__(self):
        self.model = torch.nn.Linear(3, 2)

    def label(self, image):
        mean = torch.tensor(image.mean(axis=(0, 1)), dtype=torch.float32)
        return int(self.model(mean[None]).argmax())

    def __call__(self, batch):
        with torch.inference_mode():
            labels = [self.label(image) for image in batch["image"]]
        return {"path": batch["path"], "label": np.array(labels)}


@planted("T3")
def a_forward_pass_for_each_image(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds.map_batches(OneByOne, batch_size=8, compute=pool(ray)).write_parquet(out)


@planted("I2")
def pixels_with_a_label_for_a_preset(ray, photos, table, out):
    def labeled(row):
        row["label"] = row["path"].split("/")[-2]
        return row

    def prepared(batch):
        return {"label": batch["label"], "image": [PRESET(i).numpy() for i in batch["image"]]}

    ds = ray.data.read_images(photos, mode="RGB", include_paths=True).map(labeled)
    ds = ds.map_batches(prepared, batch_size=8)
    ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}).write_parquet(out)


PRESET = transforms.Compose([transforms.ToTensor(), ResNet50_Weights.DEFAULT.transforms()])


@planted("I2", "T7")
def pixels_for_a_preset_of_torchvision(ray, photos, table, out):
    def prepared(row):
        return {"path": row["path"], "image": PRESET(row["image"]).permute(1, 2, 0).numpy()}

    ds = ray.data.read_images(photos, mode="RGB", include_paths=True).map(prepared)
    ds.map_batches(Model, batch_size=8, compute=pool(ray)).write_parquet(out)


TO_PIL, TO_TENSOR = transforms.ToPILImage(), transforms.ToTensor()


@planted("T9")
def there_and_back_with_transforms_of_the_module(ray, photos, table, out):
    def mirrored(row):
        small = TO_TENSOR(TO_PIL(row["image"]).resize((32, 32)))
        flipped = TO_PIL(small).transpose(Image.FLIP_LEFT_RIGHT)
        return {"path": row["path"], "image": TO_TENSOR(flipped).numpy()}

    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds.map(mirrored).write_parquet(out)


@planted("T8")
def pixels_iterated_as_pandas(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(160, 160), mode="RGB", include_paths=True)
    for frame in ds.iter_batches(batch_format="pandas"):
        assert len(frame)


class GivenModel:
    def __init__(self, model):
        import ray

        self.model = ray.get(model)

    def __call__(self, batch):
        x = torch.from_numpy(batch["image"]).float()
        return {"path": batch["path"], "y": self.model(x).detach().numpy()[:, 0, 0, 0]}


@planted("T11")
def autograd_with_a_given_model(ray, photos, table, out):
    model = ray.put(torch.nn.Linear(3, 2))
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    given = {"fn_constructor_args": [model], "compute": pool(ray)}
    ds.map_batches(GivenModel, batch_size=8, **given).materialize()


def label(row):
    row["label"] = row["path"].split("/")[-2]
    return row


@planted("I3", "T6")
def a_limit_that_nothing_needs(ray, photos, table, out):
    equal = [f"{photos}/n{i % 4:02d}/{i}.JPEG" for i in range(0, 24, 3)]
    ds = ray.data.read_images(equal, include_paths=True, override_num_blocks=2)
    ds = ds.map(label, concurrency=2).map(small)
    ds.map_batches(Model, batch_size=4, num_cpus=0.5, compute=pool(ray)).write_parquet(out)


@planted("I8")
def kept_for_one_reader_and_weighed(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(160, 160), mode="RGB", include_paths=True).materialize()
    print(ds.size_bytes(), ds.schema())
    ds.map_batches(lambda b: {"y": b["image"].mean(axis=(1, 2, 3))}, batch_size=8).write_parquet(
        out
    )


@planted("T6", "T7")
def a_share_that_only_one_of_two_functions_has(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode, num_cpus=0.5).map(small)
    ds.map_batches(Model, batch_size=8, compute=pool(ray)).write_parquet(out)


@planted("T6")
def a_share_that_the_filter_has_not(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode, num_cpus=0.5)
    ds.filter(lambda row: row["image"].mean() > 1).write_numpy(out, column="image")


@planted("I6", "T3")
def one_image_a_block_and_all_in_one_batch(ray, photos, table, out):
    def load(row):
        image = Image.open(row["path"]).convert("RGB").resize((32, 32))
        return {"path": row["path"], "image": np.asarray(image)}

    files = [f"{folder}/{name}" for folder, _, names in os.walk(photos) for name in names]
    ds = ray.data.from_pandas(pd.DataFrame({"path": files * 3})).repartition(72).map(load)
    ds = ds.map_batches(Model, batch_size=256, num_cpus=0.5, compute=pool(ray))
    ds.write_parquet(out, min_rows_per_file=1000)


@planted("I8", "T4")
def two_halves_of_what_is_kept(ray, photos, table, out):
    def load(row):
        image = Image.open(row["path"]).convert("RGB").resize((96, 96))
        return {"path": row["path"], "image": np.asarray(image, np.float32) / 255}

    files = [f"{folder}/{name}" for folder, _, names in os.walk(photos) for name in names]
    rows = ray.data.from_items([{"path": file} for file in files], override_num_blocks=2)
    for i, half in enumerate(rows.map(load).split(2)):
        half.map_batches(lambda batch: {"y": batch["image"][:, 0, 0, 0]}).write_parquet(
            f"{out}/{i}"
        )


@planted("R10")
def pixels_grouped_for_nothing(ray, photos, table, out):
    def share(group):
        return {"label": group["label"][:1], "n": [len(group["label"])]}

    ds = ray.data.read_images(photos, size=(160, 160), mode="RGB", include_paths=True).map(label)
    ds.groupby("label", num_partitions=2).map_groups(share).write_parquet(out)


@planted("O2")
def a_file_that_no_task_can_hold(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(224, 224), mode="RGB", include_paths=True)
    ds = ds.map_batches(CarryingModel, batch_size=8, num_cpus=0.9, compute=pool(ray))
    ds.write_parquet(out, min_rows_per_file=100_000)


class SlowToStart(IdModel):
    def __init__(self):
        time.sleep(3)


def with_a_new_model(batch):
    return {"y": batch["id"] @ np.ones((len(batch["id"]), 2)) * len(build_model())}


@planted("I9", "T2")
def looks_that_start_the_model(ray, photos, table, out):
    ray.data.range(24).map_batches(with_a_new_model, batch_size=4).take(10)
    ds = ray.data.range(400, override_num_blocks=20)
    ds = ds.map_batches(SlowToStart, batch_size=20, compute=pool(ray))
    ds.show(1)
    ds.write_parquet(out, min_rows_per_file=1000)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name, ray, photos, table, tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "_STUCK_AFTER_S", 1)
    ids, pipeline = PLANTED[name]
    found = look(lambda: pipeline(ray, photos, table, str(tmp_path / "out")))
    assert set(ids) <= set(found.ids), str(found)
    assert not found.notes
    for finding in found.findings:
        assert finding.evidence and finding.change and finding.lesson[:2].isdigit()


# ---- healthy ------------------------------------------------------------------------------------

HEALTHY = {}


def healthy(function):
    HEALTHY[function.__name__] = function
    return function


class Smooth:
    """Keeps something from one batch to the next: that is what an actor is for."""

    def __call__(self, batch):
        self.last = 0.9 * getattr(self, "last", 0.0) + 0.1 * batch["image"].mean()
        return {"path": batch["path"], "image": batch["image"] - np.uint8(self.last)}


@healthy
def an_actor_that_keeps_something(ray, photos, table, out):
    def large(row):
        return {"path": row["path"], "image": np.repeat(decode(row)["image"], 3, axis=0)}

    ds = ray.data.read_binary_files(photos, include_paths=True).map(large)
    ds = ds.map_batches(Smooth, batch_size=8, num_cpus=0.5, compute=pool(ray))
    ds.write_numpy(out, column="image")


@healthy
def text(ray, photos, table, out):
    folder = out + "-text"
    os.makedirs(folder)
    with open(f"{folder}/a.txt", "w") as file:
        file.write("\n".join(f"Some words in line {i}" for i in range(100)))
    ds = ray.data.read_text(folder).map(lambda row: {"words": len(row["text"].split())})
    ds.show(2)
    ds.write_parquet(out)


@healthy
def parquet_pushed_down(ray, photos, table, out):
    from ray.data.expressions import col

    ds = ray.data.read_parquet(table).filter(expr=col("x") > 0.5).select_columns(["id", "x"])
    ds.map_batches(lambda b: {"id": b["id"], "y": b["x"] * 2}).write_parquet(out)


@healthy
def images_in_two_steps(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode)
    ds = ds.map_batches(Model, batch_size=8, num_cpus=0.99, compute=pool(ray))
    ds.write_parquet(out, min_rows_per_file=1000)


@healthy
def images_of_one_size(ray, photos, table, out):
    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB", include_paths=True)
    ds = ds.map_batches(Model, batch_size=8, num_cpus=0.9, compute=pool(ray))
    assert len(ds.take_all()) == 24


@healthy
def a_share_of_a_cpu_for_who_waits(ray, photos, table, out):
    def fetched(row):
        with urllib.request.urlopen(pathlib.Path(row["path"]).as_uri()) as answer:
            return {"path": row["path"], "bytes": answer.read()}

    files = [{"path": f"{photos}/n{i % 4:02d}/{i}.JPEG"} for i in range(24)]
    ds = ray.data.from_items(files, override_num_blocks=4).map(fetched, num_cpus=0.1)
    ds.filter(lambda row: len(row["bytes"]) > 100).map(decode).write_numpy(out, column="image")


@healthy
def gray_photos_among_others_in_one_mode(ray, photos, table, out):
    os.makedirs(f"{out}-photos")
    for i in range(12):
        image = Image.linear_gradient("L").resize((96, 96))
        (image if i % 3 else image.convert("RGB")).save(f"{out}-photos/{i}.jpg")
    ds = ray.data.read_images(f"{out}-photos", mode="RGB", include_paths=True)
    ds.map_batches(Model, batch_size=4, num_cpus=0.9, compute=pool(ray)).write_parquet(out)


@healthy
def as_many_actors_as_cores_do_it_all(ray, photos, table, out):
    share = {"num_cpus": 0.4}  # what they reserve is less than what they use
    ds = ray.data.read_binary_files(photos, include_paths=True, **share).map(decode, **share)
    ds = ds.map_batches(Model, batch_size=8, compute=pool(ray, size=2), **share)
    ds.write_parquet(out, min_rows_per_file=1000)


@healthy
def fewer_images_than_blocks(ray, photos, table, out):
    for i in range(2):  # of more, the plan would have one operator
        Image.new("RGB", (900, 700), (40 * i, 90, 160)).save(f"{out}-{i}.JPEG")
    files = [f"{out}-{i}.JPEG" for i in range(2)]
    ds = ray.data.read_images(files, mode="RGB", include_paths=True).map(small)
    ds.write_parquet(out)


@healthy
def small_data(ray, photos, table, out):
    ds = ray.data.from_items([{"id": i} for i in range(12)], override_num_blocks=3)
    ds = ds.map(lambda row: {"id": row["id"], "square": row["id"] ** 2})
    ds.filter(lambda row: row["square"] > 10).take_all()


@healthy
def intended_split(ray, photos, table, out):
    ds = ray.data.read_binary_files(photos, include_paths=True, num_cpus=0.25).map(decode)
    ds = ds.map_batches(lambda b: {"mean": b["image"].mean(axis=(1, 2, 3))}, num_cpus=2)
    ds.write_parquet(out)


@healthy
def materialized_for_several_readers(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(lambda b: {"y": b["id"] * 2}).materialize()
    ds.count()
    ds.write_parquet(out)


@healthy
def summary_written_by_the_driver(ray, photos, table, out):
    frame = pd.DataFrame({"k": np.arange(90) % 3, "v": np.arange(90.0)})
    ds = ray.data.from_pandas(frame)
    ds = ds.map_batches(lambda f: f.assign(w=f.v * 2), batch_format="pandas")
    ds.groupby("k").mean("w").to_pandas().to_csv(f"{out}.csv")


@healthy
def labels_written_by_pandas(ray, photos, table, out):
    ds = ray.data.range(100).map_batches(IdModel, batch_size=25, compute=pool(ray))
    ds.to_pandas().to_csv(f"{out}.csv")


@healthy
def several_epochs(ray, photos, table, out):
    ds = ray.data.range(64).map_batches(lambda b: {"x": b["id"] / 64}).random_shuffle()
    for _ in range(2):
        for _ in ds.iter_batches(batch_size=32):
            pass


@healthy
def errors_recorded(ray, photos, table, out):
    def decode_or_say_why(row):
        try:
            return {"path": row["path"], "mean": decode(row)["image"].mean(), "error": ""}
        except Exception as error:
            return {"path": row["path"], "mean": float("nan"), "error": str(error)}

    ds = ray.data.read_binary_files(photos, include_paths=True).map(decode_or_say_why)
    ds.write_parquet(out)


@healthy
def shards_into_one_folder(ray, photos, table, out):
    for start in (0, 50):
        items = [{"id": i} for i in range(start, start + 50)]
        ray.data.from_items(items, override_num_blocks=2).map(lambda r: r).write_parquet(out)


@healthy
def tiles_into_one_small_table(ray, photos, table, out):
    def tiles(row):
        boxes = [(y, x) for y in range(2) for x in range(2)]
        parts = []
        for y in range(2):
            for x in range(2):
                parts.append(row["image"][32 * y : 32 * (y + 1), 32 * x : 32 * (x + 1)])
        return [{"box": str(box), "mean": p.mean()} for box, p in zip(boxes, parts, strict=True)]

    ds = ray.data.read_images(photos, size=(64, 64), mode="RGB").flat_map(tiles)
    ds.repartition(1).write_csv(out)


@healthy
def written_then_read(ray, photos, table, out):
    ray.data.range(50).map_batches(lambda b: {"y": b["id"] * 2}).write_parquet(out)
    answers = ray.data.read_parquet(out)
    assert answers.count() == 50
    answers.take(2)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_pipeline_gets_a_clean_bill(name, ray, photos, table, tmp_path):
    found = look(lambda: HEALTHY[name](ray, photos, table, str(tmp_path / "out")))
    assert found.healthy, str(found)
    assert found.executions >= 1 and not found.notes


def test_small_files_are_reported_once_by_the_write_that_made_them(ray, tmp_path):
    def write_and_read_back():
        ds = ray.data.range(1000, override_num_blocks=110)
        ds.map_batches(lambda b: {"y": b["id"] + 1}).write_parquet(str(tmp_path / "out"))
        ray.data.read_parquet(str(tmp_path / "out")).map_batches(lambda b: b).count()

    first = look(write_and_read_back)
    assert "O1" in first.ids and "I5" not in first.ids
    later = look(
        lambda: ray.data.read_parquet(str(tmp_path / "out")).map_batches(lambda b: b).count()
    )
    assert "I5" in later.ids


def test_pixels_that_wait_for_a_whole_file_name_the_write(ray, photos, tmp_path):
    def mean(batch):
        return {"path": batch["path"], "mean": [image.mean() for image in batch["image"]]}

    def pipeline():
        ds = ray.data.read_images(photos, mode="RGB", include_paths=True).map_batches(mean)
        ds.write_parquet(str(tmp_path / "out"), min_rows_per_file=1000)

    found = {finding.id: finding for finding in look(pipeline).findings}
    assert "the write collects 1000 rows" in found["I2"].evidence


def test_small_objects_of_a_bucket_are_many_sooner_than_small_files(ray, tmp_path):
    with S3Server(latency_s=0) as server:
        for i in range(100):
            server.put(f"photos/{i}.jpeg", bytes(100))
            (tmp_path / f"{i}.jpeg").write_bytes(bytes(100))

        def two_jobs(folder, **where):
            for _ in range(2):
                files = ray.data.read_binary_files(folder, override_num_blocks=2, **where)
                files.map(lambda row: {"size": len(row["bytes"])}).take_all()

        remote = look(lambda: two_jobs("photos", filesystem=server.filesystem()))
        local = look(lambda: two_jobs(str(tmp_path)))
    assert "I5" in remote.ids
    assert "I5" not in local.ids


def test_the_plan_of_a_gpu_is_read_without_one(ray, photos, monkeypatch):
    """A plan that would run on a GPU, read as on a cluster that has one."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    ds = ray.data.read_images(photos, mode="RGB", include_paths=True).map(small)
    gpu = ds.map_batches(Model, batch_size=8, num_gpus=1, compute=pool(ray))
    assert doctor.diagnose(gpu).healthy
    two = ds.map_batches(Model, batch_size=8, num_gpus=1, compute=pool(ray, size=2))
    assert doctor.diagnose(two).ids == ["R6"]
    reserved = ray.data.read_images(photos, size=(64, 64), mode="RGB").map(small, num_gpus=0.2)
    assert doctor.diagnose(reserved).ids == ["R5"]


# ---- diagnose -----------------------------------------------------------------------------------


def test_diagnose_reads_the_plan_and_runs_only_when_asked(ray):
    ran = []
    ds = ray.data.range(40, override_num_blocks=2).map_batches(IdModel, batch_size=1)
    with doctor.watch() as seen:
        found = doctor.diagnose(ds)
        ran.append(len(seen.executions))
    assert found.ids == ["T3"] and found.not_run and ran == [0]
    assert "T3" in repr(found) and "batch" in found._repr_html_()
    again = doctor.diagnose(ds, run=True)
    assert again.ids == ["T3"] and not again.not_run
    assert again.findings[0].numbers["batch_size"] == 1


def test_diagnose_uses_the_statistics_of_a_dataset_that_ran(ray):
    ds = ray.data.range(100).map_batches(lambda b: {"y": b["id"]}).materialize()
    assert doctor.diagnose(ds).healthy


def test_the_doctor_leaves_no_trace(ray):
    before = ray.data.Dataset.count, json.dump
    with doctor.watch():
        assert ray.data.Dataset.count is not before[0]
    assert (ray.data.Dataset.count, json.dump) == before


def test_a_broken_rule_hides_no_other(ray, monkeypatch):
    def broken(case):
        raise ValueError("unusual pipeline")

    rule = rules.Rule("broken", "", broken)
    monkeypatch.setitem(rules.RULES, "I1", rule)
    ds = ray.data.range(40, override_num_blocks=2).map_batches(IdModel, batch_size=1)
    assert doctor.diagnose(ds).ids == ["T3"]


def test_every_mistake_is_seen_or_said_to_be_invisible():
    assert not set(rules.RULES) & set(rules.CANNOT_SEE)
    missing = set(MISTAKES) - set(rules.RULES) - set(rules.CANNOT_SEE)
    assert not missing, f"no rule and no reason for {missing}"
    for mistake_id in [*rules.RULES, *rules.CANNOT_SEE, "X1"]:
        assert rules.catalog_column(mistake_id)


# ---- reading code -------------------------------------------------------------------------------


class Remembers:
    def __init__(self):
        self.model = None

    def __call__(self, batch):
        if self.model is None:
            self.model = build_model()
        return batch


class Rebuilds:
    def __call__(self, batch):
        return self._predict(batch)

    def _predict(self, batch):
        return build_model() @ batch["x"]


class BuildsOnFirstUse:
    def __init__(self):
        self.net = None

    def _build(self):
        return build_model()

    def __call__(self, batch):
        if self.net is None:
            self.net = self._build()
        return self.net @ batch["x"]


def test_a_model_that_is_remembered_is_not_built_again():
    assert functions.facts(Rebuilds).models_built() == ["build_model"]
    assert not functions.facts(Remembers).models_built()
    assert not functions.facts(BuildsOnFirstUse).models_built()


def gray_for_what_it_expects(row):
    try:
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
    except OSError:
        image = Image.new("RGB", (96, 96), (128, 128, 128))
    return {"path": row["path"], "image": np.asarray(image.resize((96, 96)))}


def gray_and_a_mark(row):
    try:
        image, status = Image.open(io.BytesIO(row["bytes"])).convert("RGB"), "read"
    except OSError:
        image, status = Image.new("RGB", (96, 96)), ""
    return {"image": np.asarray(image.resize((96, 96))), "status": status}


def gray_and_a_flag(row):
    try:
        pixels, there = np.asarray(Image.open(row["path"])), True
    except OSError:
        pixels, there = np.zeros((96, 96, 3), np.uint8), False
    return {"image": pixels, "there": there}


def test_pixels_that_are_made_up():
    assert not functions.facts(gray_and_a_flag).swallowed()[0]
    assert "Image.new" in functions.facts(gray_for_what_it_expects).swallowed()[0]
    assert not functions.facts(gray_and_a_mark).swallowed()[0]


def frame_mask(df):
    keep = (df["x"] > 0.5) & df.label.isin(["a", "b"])
    return df[keep].reset_index(drop=True)


def arrow_mask(table):
    return table.filter(pc.and_(pc.greater(table["x"], 0.5), pc.equal(table.column("id"), 3)))


def numpy_mask(batch):
    """Those with a high score."""
    mask = batch["x"] > 0.5
    return {name: column[mask] for name, column in batch.items()}


def computed_mask(batch):
    mask = np.linalg.norm(batch["x"], axis=1) > 0.5
    return {name: column[mask] for name, column in batch.items()}


def mask_in_two_steps(df):
    mask = df["x"] > 0.5
    mask = mask & (df["id"] < 3)
    return df[mask]


def mask_and_more(df):
    df["y"] = df["x"] * 2
    return df[df["x"] > 0.5]


def test_functions_that_only_choose_rows():
    columns = [functions.facts(f).columns_of_a_mask() for f in (frame_mask, arrow_mask, numpy_mask)]
    assert columns == [{"x", "label"}, {"x", "id"}, {"x"}]
    assert not functions.facts(computed_mask).columns_of_a_mask()
    assert not functions.facts(mask_and_more).columns_of_a_mask()
    assert not functions.facts(mask_in_two_steps).columns_of_a_mask()


def test_numpy_saves_however_it_is_called(tmp_path):
    with observe.watch() as seen:
        np.save(tmp_path / "a.npy", np.ones(3), False)
        np.save(file=tmp_path / "b.npy", arr=np.ones(4))
        np.save(tmp_path / "c.npy", 5.0)
    assert [rows for _, rows in seen.collected] == [3, 4]
    assert not seen.notes


class Loaded(torch.nn.Module):
    @classmethod
    def fresh(cls):
        return cls().eval()


def loaded_by_a_class_method(batch):
    return {"y": Loaded.fresh()(batch["image"])}


def to_square(pixels):
    return np.asarray(transforms.ToPILImage()(pixels).resize((96, 96)))


def to_tone(pixels):
    return transforms.ToTensor()(Image.fromarray(pixels)).numpy()


def steps_in_a_loop(row):
    for step in (to_square, to_tone):
        row["image"] = step(row["image"])
    return row


def lines_and_values(row):
    gray, total = row["image"].tolist(), 0
    for y in range(1, len(gray)):
        above, here = gray[y - 1], gray[y]
        for x in range(len(here)):
            total += here[x] - above[x]
    return {"y": total}


def boxes_and_their_corners(row):
    areas = []
    for i in range(len(row["boxes"])):
        box = row["boxes"][i]
        for k in range(2):
            areas.append((box[2] - box[0]) * k)
    return {"area": areas}


def test_code_that_is_reached_in_other_ways():
    assert functions.facts(loaded_by_a_class_method).models_built() == ["Loaded"]
    assert functions.facts(steps_in_a_loop).conversions().count("array to PIL") == 2
    assert functions.facts(lines_and_values).nested_pixel_loop()
    assert not functions.facts(boxes_and_their_corners).nested_pixel_loop()


def chosen_by_name(batch):
    return {"y": getattr(torchvision.models, "resnet18")(weights=None)(batch["image"])}  # noqa: B009


def test_a_model_that_is_chosen_by_its_name():
    assert functions.facts(chosen_by_name).models_built() == ["torchvision.models.resnet18"]


def drops_silently(row):
    try:
        return [decode(row)]
    except Exception:
        return []


def drops_and_says_so(row):
    try:
        return [decode(row)]
    except Exception:
        print("dropped", row["path"])
        return []


def drops_what_it_expects(row):
    try:
        return [decode(row)]
    except OSError:
        return []


def test_rows_that_are_dropped_without_a_word():
    assert functions.facts(drops_silently).swallowed()[1]
    assert not functions.facts(drops_and_says_so).swallowed()[0]
    assert not functions.facts(drops_what_it_expects).swallowed()[0]


def one_thread(batch):
    torch.set_num_threads(1)
    return batch


THREADS = 4


def four_threads(batch):
    torch.set_num_threads(THREADS)
    return batch


def test_one_thread_is_no_threading():
    assert functions.facts(four_threads).threads_itself()
    assert functions.facts(four_threads).torch_threads(cores=2) == 4
    assert not functions.facts(one_thread).threads_itself()


def squares_by_hand(batch):
    total = []
    for vector in batch["vector"]:
        total.append(sum(value * value for value in vector))
    return {"y": total}


def squares_by_row(batch):
    return {"y": [float((vector**2).sum()) for vector in batch["vector"]]}


def by_index(row):
    values = row["vector"]
    total = 0.0
    for i in range(len(values)):
        total += values[i] ** 2
    return {"y": total}


def levels(batch):
    counts = [0] * 256
    for pixels in batch["image"]:
        for r, g, b in pixels.reshape(-1, 3).tolist():
            counts[(r + g + b) // 3] += 1
    return {"y": counts}


def test_loops_over_the_numbers_of_a_column():
    (column, depth), *_ = functions.facts(levels).column_loops()
    assert column == "image" and depth >= functions.EVERY_NUMBER
    assert ("vector", 2) in functions.facts(squares_by_hand).column_loops()
    assert functions.facts(by_index).column_loops() == [("vector", 1)]
    assert not functions.facts(squares_by_row).column_loops()
    assert not functions.facts(lambda batch: {"y": batch["x"] * 2}).column_loops()


def test_columns_are_known_only_when_the_row_is_not_passed_on():
    assert functions.facts(lambda row: row["a"] + row.get("b", 0)).columns_used() == {"a", "b"}
    assert functions.facts(lambda row: {**row, "c": row["a"]}).columns_used() is None
    assert functions.facts(len).columns_used() is None


@dataclasses.dataclass
class Limits:
    width: int = 500


def test_filters_that_an_expression_can_say():
    limits = Limits()
    assert functions.facts(lambda row: row["a"] < limits.width).expressible()
    assert not functions.facts(lambda row: row.a < 3).expressible()
    assert functions.facts(lambda row: row["a"] > 3 and row["b"] != "x").expressible()
    assert not functions.facts(lambda row: row["a"].startswith("x")).expressible()


class DoubleModel:
    def __init__(self):
        self.net = torch.nn.Linear(3, 2).double()

    def __call__(self, batch):
        with torch.inference_mode():
            return {"y": self.net(torch.tensor(batch["x"])).numpy()}


class DoubleImages(DoubleModel):
    def __init__(self):
        self.net = torch.nn.Linear(3, 2)

    def __call__(self, batch):
        images = torch.tensor(batch["x"], dtype=torch.float64)
        with torch.inference_mode():
            return {"y": self.net(images).numpy()}


class DoubleAnswers(DoubleImages):
    def __call__(self, batch):
        with torch.inference_mode():
            y = self.net(torch.tensor(batch["x"]))
            return {"y": y.double().numpy(), "best": y.max(1).values.to(torch.float64)}


def make_backbone():
    net = torch.nn.Linear(3, 2)
    return net.eval()


def with_a_backbone(batch):
    backbone = make_backbone()
    return {"y": backbone(torch.tensor(batch["x"])).detach().numpy()}


def test_double_precision_counts_in_the_model_and_not_in_its_answers():
    assert functions.facts(DoubleModel).float64()
    assert functions.facts(DoubleImages).float64()
    assert not functions.facts(DoubleAnswers).float64()


def built_where_it_is_called(batch):
    from torchvision.models import resnet18

    net = resnet18(weights=None)
    return {"y": net(batch["image"]).detach().numpy()}


def test_autograd_is_seen_where_only_workers_import_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert "net" in functions.facts(built_where_it_is_called).autograd()


def test_a_model_from_a_builder_runs_with_autograd():
    assert "make_backbone" in functions.facts(with_a_backbone).autograd()


class InChunks(OneByOne):
    def __call__(self, batch):
        parts = [batch["image"][at : at + 4] for at in range(0, len(batch["image"]), 4)]
        return {"y": np.concatenate([self.model(torch.tensor(part)).numpy() for part in parts])}


class OverAnswers(OneByOne):
    def __call__(self, batch):
        x = torch.tensor(batch["image"])
        return {"y": [f"{p}: {y}" for p, y in zip(batch["path"], self.model(x), strict=True)]}


class NormalizesOnly:
    def __init__(self):
        self.transforms = transforms.Compose([transforms.ToTensor()])

    def __call__(self, row):
        return {"image": self.transforms(row["image"]).numpy()}


class Preparation:
    def __init__(self):
        self.transforms = ResNet50_Weights.DEFAULT.transforms()

    def many(self, images):
        return torch.stack([self.transforms(Image.fromarray(image)) for image in images])


class Predictions:
    def __init__(self):
        self.preparation = Preparation()
        self.net = resnet18().eval()

    def __call__(self, images):
        return self.net(self.preparation.many(images)).detach().numpy()

    def reload(self):
        self.net = resnet18().eval()


def test_transforms_may_stand_in_a_list():
    steps = [transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()])] * 2
    assert functions.composed(lambda row: [step(row) for step in steps]).count("to tensor") == 2


CACHE = None


def network():
    global CACHE
    CACHE = CACHE or resnet18().eval()
    return CACHE


def with_network(batch):
    return {"y": network()(batch["x"])}


class NoGradAtTheStart:
    def __init__(self):
        with torch.no_grad():
            self.net = resnet18().eval()

    def __call__(self, batch):
        return {"y": self.net(batch["x"]).detach()}


def test_no_grad_around_the_start_ends_with_it():
    assert functions.facts(NoGradAtTheStart).autograd()


def test_a_function_of_any_name_may_keep_a_model():
    assert not functions.facts(with_network).models_built()  # where Ray Data can import it
    call = next(c for c in functions.facts(with_network).calls if c.name == "network")
    assert call.guarded and call.makes_model


class Delegates:
    def __init__(self):
        self.predictions = Predictions()

    def __call__(self, batch):
        return {"y": self.predictions(batch["image"])}


class DelegatesAndReloads(Delegates):
    def __call__(self, batch):
        self.predictions.reload()
        return super().__call__(batch)


def test_objects_of_an_object_belong_to_it():
    facts = functions.facts(Delegates)
    assert facts.resizes and facts.model_built_in_init and not facts.models_built()
    assert "self.net" in facts.autograd()
    assert functions.facts(DelegatesAndReloads).models_built()


def test_transforms_that_are_applied_need_not_resize():
    assert not functions.resizes(NormalizesOnly)
    assert functions.resizes(lambda row: PRESET(row["image"]))


def test_a_model_that_gets_chunks_is_not_called_for_each_row():
    assert not functions.facts(OverAnswers).forward_for_each_row()
    assert "for image in batch['image']" in functions.facts(OneByOne).forward_for_each_row()
    assert not functions.facts(InChunks).forward_for_each_row()
    assert not functions.facts(Matcher).forward_for_each_row()


def test_images_of_different_shapes_may_come_one_by_one(ray, photos, tmp_path):
    ds = ray.data.read_images(photos, mode="RGB", include_paths=True)
    ds = ds.map_batches(OneByOne, batch_size=8, num_cpus=0.9, compute=pool(ray))
    assert "T3" not in look(lambda: ds.write_parquet(str(tmp_path / "out"))).ids


# ---- command line -------------------------------------------------------------------------------

SCRIPT = """
import sys
import ray

def double(batch):
    return {"y": batch["id"] * 2}

ds = ray.data.range(50, override_num_blocks=2).map_batches(double, batch_size=%s)
print("rows", len(ds.take_all()), sys.argv[1:], __name__)
%s
"""


def run_cli(capsys, *arguments):
    code = cli.main(["doctor", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("size", "ending", "code"),
    [("10", "", 0), ("1", "", 1), ("1", "raise KeyError('theirs')", 2), ("10", "sys.exit(3)", 2)],
)
def test_exit_codes(ray, tmp_path, capsys, size, ending, code):
    script = tmp_path / "theirs.py"
    script.write_text(SCRIPT % (size, ending))
    result, out, err = run_cli(capsys, script, "--name", "x")
    assert result == code, out + err
    assert "rows 50 ['--name', 'x'] __main__" in out
    assert ("T3" in out) == (size == "1"), "what was found until then is shown"
    assert ("KeyError" in err) == ("KeyError" in ending)
    if "KeyError" in ending:
        assert "helpers/doctor.py" not in err.split("KeyError")[0].split("theirs.py")[0]


def test_json_is_the_last_line_or_a_file(ray, tmp_path, capsys):
    script = tmp_path / "theirs.py"
    script.write_text(SCRIPT % ("1", ""))
    code, out, _ = run_cli(capsys, script, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 1 and result["version"] == 1 and result["failure"] == ""
    assert [f["id"] for f in result["findings"]] == ["T3"]
    assert {"title", "operator", "evidence", "numbers", "change", "lesson", "seen"} <= set(
        result["findings"][0]
    )
    code, out, _ = run_cli(capsys, "--json", tmp_path / "found.json", script)
    assert json.loads((tmp_path / "found.json").read_text())["findings"] == result["findings"]
    code, out, _ = run_cli(capsys, script, "--", "--json")
    assert "['--json']" in out and "T3" in out


def test_user_mistakes_have_no_traceback(tmp_path, capsys):
    code, _, err = run_cli(capsys, tmp_path / "nowhere.py")
    assert code == 2 and "no file" in err and "Traceback" not in err
    (tmp_path / "bad.py").write_text("def f(:\n")
    code, _, err = run_cli(capsys, tmp_path / "bad.py")
    assert code == 2 and "not valid Python" in err


def test_it_works_from_another_folder_and_starts_ray(tmp_path):
    script = tmp_path / "own.py"
    start = "import ray\nray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
    script.write_text(start + SCRIPT % ("1", ""))
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", "own.py", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["findings"][0]["id"] == "T3"


weights = np.zeros(1_000_000)  # a script's global, which only the first of these refers to


def test_an_attribute_is_no_global_of_the_same_name():
    class Refers:
        def __call__(self, batch):
            return {"y": batch["x"] @ weights}

    class HasItsOwn:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, batch):
            return {"y": batch["x"] @ self.weights}

    assert functions.captured(Refers) == [("weights", weights.nbytes)]
    assert not functions.captured(HasItsOwn)


class HoldsACpu:
    def __call__(self, batch):
        return batch


SCRIPT_WITH_A_GLOBAL = """
import torchvision

model = None

def get_model(log):
    global model
    if model is None:
        with open(log, "a") as file:
            file.write("built\\n")
        model = torchvision.models.squeezenet1_1()
    return model

def predict(batch, log):
    get_model(log)
    return {"id": batch["id"]}
"""


def test_a_global_of_a_script_lasts_for_one_task(ray, tmp_path):
    file, log = tmp_path / "script.py", tmp_path / "log"
    file.write_text(SCRIPT_WITH_A_GLOBAL)
    script = {"__name__": "__main__"}
    exec(compile(SCRIPT_WITH_A_GLOBAL, str(file), "exec"), script)
    rows = ray.data.range(30, override_num_blocks=6)
    predict = functools.partial(script["predict"], log=str(log))
    found = look(lambda: rows.map_batches(predict, batch_size=1).materialize())
    (finding,) = (f for f in found.findings if f.id == "T2")
    assert finding.numbers["constructions"] == 6
    assert len(log.read_text().splitlines()) == 6


def test_an_execution_that_is_blocked_inside_a_step_is_ended(ray, monkeypatch):
    monkeypatch.setattr(observe, "_STUCK_AFTER_S", 3)
    pool = {"compute": ray.data.ActorPoolStrategy(size=2), "num_cpus": 1}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        with doctor.watch() as seen, pytest.raises(KeyboardInterrupt):
            rows = ray.data.from_items([{"x": i} for i in range(8)]).repartition(4)
            rows.map(lambda row: row, num_cpus=0.5).map_batches(HoldsACpu, **pool).materialize()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "2 of 2 CPUs" in seen.blocked
    assert "R4" in seen.diagnosis().ids
    # Whoever shuts Ray down now must not do so under a loop that still runs.
    assert not [t for t in threading.enumerate() if t.name.startswith("StreamingExecutor")]
