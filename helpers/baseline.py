"""The baseline: the same job as a newcomer might write it, with many mistakes of the course in it.

    run("photos", "answers")

Every line does what it says, and the answers are right. Each mistake is marked with its id in the
mistake index. `helpers.optimized` is the same job without them. Do not copy this one.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import ray.data
import torch
from PIL import Image
from ray.data import TaskPoolStrategy

from helpers import model

BATCH_SIZE = 4  # T3: far too small for a GPU; R11: the same on every device
MEAN, STD = np.array(model.MEAN, np.float32), np.array(model.STD, np.float32)


# ---- preprocessing ------------------------------------------------------------------------------


def shorten(row: dict) -> dict:
    """The names that the rest works with."""
    return {"path": row["path"], "photo": row["image"]}


def resize(row: dict) -> dict:
    try:
        photo = Image.fromarray(row["photo"])  # T9: array to PIL ...
        smaller = np.asarray(model.resize(photo))  # ... to array ...
        crop = np.asarray(model.center_crop(Image.fromarray(smaller)))  # ... and round again
    except Exception:  # I11: whatever goes wrong becomes a black image, and nobody is told
        crop = np.zeros((224, 224, 3), np.uint8)
    return {**row, "crop": crop}  # T5: the photograph comes along, to the very end


def normalize(row: dict) -> dict:
    pixels = row["crop"].astype(np.float32) / 255
    for channel in range(3):  # T1: row by row, channel by channel
        pixels[..., channel] = (pixels[..., channel] - MEAN[channel]) / STD[channel]
    return {**row, "pixels": pixels.transpose(2, 0, 1).copy()}  # T4: four bytes for each pixel


# ---- the model ----------------------------------------------------------------------------------


def make_classify():
    """A function that classifies a batch."""
    names = model.categories()
    numbers = model.resnet50().state_dict()  # T10: a hundred megabytes travel with the function

    def classify(batch: pd.DataFrame) -> pd.DataFrame:  # T8: pandas for tensors
        net = model.resnet50()  # T2: built again for every batch
        net.load_state_dict(numbers)
        images = torch.from_numpy(np.stack([np.asarray(pixels) for pixels in batch["pixels"]]))
        logits = net(images).detach().numpy()  # T11: float32, NCHW, autograd on
        batch["logits"] = list(logits)
        batch["label"] = [names[index] for index in logits.argmax(axis=1)]
        return batch  # O5: all columns go on to the output

    return classify


# ---- the pipeline -------------------------------------------------------------------------------


def pipeline(source, limit: int | None = None) -> ray.data.Dataset:
    """A Dataset with `path`, `label`, `logits` and all that led to them."""
    wanted = list_images(source)[:limit]
    photos = ray.data.read_images(
        wanted,  # I5: file by file, in every job anew
        mode="RGB",  # I3: no size, so each image has another shape
        include_paths=True,
        override_num_blocks=4 * len(wanted),  # I6: more tasks than files
        num_cpus=0.5,  # I10: decoding needs a whole core; I2: and what leaves the read is pixels
    )
    photos = photos.map(shorten).materialize()  # I8: all of them, decoded, in the object store
    crops = photos.map(resize, num_cpus=0.5).map(normalize)  # T6: different requests, no fusion
    gpus = 1 if torch.cuda.is_available() else None
    return crops.map_batches(
        make_classify(),
        batch_size=BATCH_SIZE,
        batch_format="pandas",
        compute=TaskPoolStrategy(size=1),  # R1: one worker, whatever the machine has
        num_cpus=1,  # R2: so one thread, and the model waits for it
        num_gpus=gpus,  # R5: the model stays on the CPU, and holds a GPU all the same
    )


def run(source, output: str, limit: int | None = None) -> int:
    """Classify the images of `source` into Parquet files in `output`. Returns how many there are.

    P3: it starts from nothing, whatever was done before. P4: it says nothing while it runs.
    """
    answers = pipeline(source, limit)
    count = answers.count()  # I9: the whole pipeline runs, to count
    print(f"{count} images, for instance {answers.take(1)[0]['label']}")  # I9: a part of it, again
    table = pd.DataFrame(answers.take_all())  # I9, and O3: all of it on the driver
    report = table.drop(columns=["photo", "crop", "pixels"])
    report["logits"] = [list(logits) for logits in report["logits"]]
    os.makedirs(output, exist_ok=True)
    report.to_csv(Path(output) / "report.csv")  # O4: numbers as text
    answers = answers.sort("path").random_shuffle()  # R10: order, then none; O8: before a write
    # I9: once more. O1: a file for each block. O6: and for each label. O7: beside what is there.
    answers.write_parquet(output, partition_cols=["label"])
    return count


def list_images(source) -> list[str]:
    """The image files of a local folder and all below it, by name; or of a list, as it is."""
    if not isinstance(source, str):
        return [str(path) for path in source]
    files = sorted(Path(source).expanduser().absolute().rglob("*"))
    return [str(file) for file in files if file.suffix.lower() in (".jpeg", ".jpg", ".png")]
