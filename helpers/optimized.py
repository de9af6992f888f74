"""The optimized pipeline: image files in, Parquet with one row per image out. Copy it.

    settings = device.recommend()
    run("s3://bucket/photos", "s3://bucket/answers", settings)

It streams, from a local folder or a bucket to a local folder or a bucket. Run it again after a
crash and it does what is missing. It needs a class that holds your model, a function that prepares
one image, and the settings; here they are ResNet50's, from this package. A comment names the
mistake that a line avoids, by its id in the mistake index.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.fs
import pyarrow.parquet
import ray.data
from ray.data import ActorPoolStrategy

from helpers import model
from helpers.device import Settings

IMAGES = (".jpeg", ".jpg", ".png")


# ---- what happens to the images -----------------------------------------------------------------


def prepare(encoded: bytes) -> tuple[np.ndarray, str]:
    """An encoded image -> its crop, uint8 (224, 224, 3), and why there is none ("" if there is)."""
    try:
        return model.preprocess(encoded), ""  # uint8: a quarter of the bytes of float32 (T4)
    except ValueError as error:  # one broken file must not stop a million others (P1)
        return np.zeros((model.CROP, model.CROP, 3), np.uint8), str(error)


def prepare_row(row: dict) -> dict:
    image, error = prepare(row["bytes"])
    return {"path": row["path"], "image": image, "error": error}


class Classify:
    """One replica of the model, built once for each actor (T2)."""

    def __init__(self, settings: Settings):
        self.settings = settings
        # PyTorch takes seconds to import: meanwhile the first images are decoded.
        self.net = ThreadPoolExecutor(1).submit(self.load)

    def load(self):
        model.tune_memory()
        how = self.settings.precision, self.settings.channels_last
        net = model.resnet50(*how, fold_batch_norm=True)  # T11
        return net.to(self.settings.torch_device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "image" in batch:
            images, errors = batch["image"], batch["error"]
        else:
            prepared = [prepare(encoded) for encoded in batch["bytes"]]
            images = np.stack([image for image, _ in prepared])
            errors = np.array([error for _, error in prepared], dtype=object)
        logits = self.logits(images)
        failed = errors != ""
        logits[failed] = np.nan  # never a plausible answer for an image that was not read (I11)
        labels = np.where(failed, -1, logits.argmax(axis=1))
        # The answers and nothing else: no pixels leave this stage (T5, O5).
        return {"path": batch["path"], "label": labels, "logits": logits, "error": errors}

    def logits(self, images: np.ndarray) -> np.ndarray:
        net, size = self.net.result(), self.settings.batch_size
        import torch  # loaded by now; neither the driver nor a decoding task needs it

        torch.set_num_threads(self.settings.threads)  # each thread has a number of its own (R2)
        parts = [images[at : at + size] for at in range(0, len(images), size)]  # T3
        return np.concatenate([model.predict(net, part) for part in parts])


# ---- the pipeline -------------------------------------------------------------------------------


def pipeline(paths: list[str], settings: Settings, filesystem=None) -> ray.data.Dataset:
    """A Dataset with `path`, `label` (-1: failed), `logits` (1000 float32) and `error` of each
    image. Nothing runs before it is consumed."""
    pool = {
        "compute": ActorPoolStrategy(size=settings.actors),  # R1, R6
        "fn_constructor_args": (settings,),
        "num_cpus": settings.cpus_per_actor,  # leaves CPUs for everything else (R4)
        "num_gpus": settings.gpus_per_actor,  # only where there is one (R3)
    }
    # Blocks of some batches: no task for each file (I6), no block for all of them (I7).
    # As many for each actor, so that all end together.
    rounds = math.ceil(len(paths) / settings.images_per_block / settings.actors)
    blocks = rounds * settings.actors
    read = {
        "include_paths": True,
        "filesystem": filesystem,
        "override_num_blocks": min(blocks, len(paths)),
    }
    # Encoded files are the smallest form that an image ever has (I2).
    if settings.torch_device == "cpu":
        # The model uses the cores that decoding would use, so overlap wins nothing here. With equal
        # requests and whole blocks Ray Data fuses it all: an actor reads, decodes and classifies,
        # nothing goes through the object store, and no process but the actors has to start.
        rows = ray.data.read_binary_files(paths, num_cpus=settings.cpus_per_actor, **read)
        return rows.map_batches(Classify, batch_size=None, **pool)
    # The CPUs decode while the GPU works. The function is fused with the read (T6) and, since the
    # model asks for a GPU, not with the model (T7).
    rows = ray.data.read_binary_files(paths, **read).map(prepare_row)
    return rows.map_batches(Classify, batch_size=settings.batch_size, **pool)  # T3


def run(source, output: str, settings: Settings, limit: int | None = None) -> dict[str, int]:
    """Classify what `source` holds and is not yet in `output`.

    Args:
        source: a folder, local or "s3://...", or a list of files.
        output: a folder for Parquet files, local or "s3://...".
        limit: only the first so many images.

    Returns the number of images that were `found`, `done` before, and `classified` now.
    """
    filesystem, paths = list_images(source)
    paths = paths[:limit]
    target, folder = open_folder(output)
    done = finished(target, folder)
    todo = [path for path in paths if path not in done]
    if todo:
        ray.remote(start_writer).options(num_cpus=0).remote()
        rows = pipeline(todo, settings, filesystem)
        rows.set_name("classify")  # how logs and the dashboard call it (P4)
        # Written once, by the workers, as it comes (I8, I9, O3). About 32 files: few for whoever
        # reads them (O1, O2), and a crash costs little. No file is written twice, since what is
        # done is not done again (O7, P3).
        rows_per_file = min(max(64, len(todo) // 32), 16_384)
        rows.write_parquet(folder, filesystem=target, min_rows_per_file=rows_per_file)
    return {"found": len(paths), "done": len(paths) - len(todo), "classified": len(todo)}


def start_writer() -> None:
    """Nothing. But a process starts and imports Ray Data for it, and Ray will let it write: so this
    is done while cores wait for the model, and not when the model wants them all."""


# ---- files --------------------------------------------------------------------------------------


def list_images(source) -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The image files of a folder and all below it, by name; or of a list, as it is."""
    if not isinstance(source, str):
        return pyarrow.fs.LocalFileSystem(), list(source)
    filesystem, folder = open_folder(source)
    files = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))
    return filesystem, sorted(file.path for file in files if file.path.lower().endswith(IMAGES))


def open_folder(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A folder's file system and its path there. `s3://anonymous@bucket/...` needs no account."""
    if uri.startswith("s3://anonymous@"):
        path = uri.removeprefix("s3://anonymous@").rstrip("/")
        region = pyarrow.fs.resolve_s3_region(path.partition("/")[0])
        return pyarrow.fs.S3FileSystem(anonymous=True, region=region), path
    if "://" in uri:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    return pyarrow.fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


class OutputError(ValueError):
    """The output folder is used for something else."""


def finished(filesystem: pyarrow.fs.FileSystem, folder: str) -> set[str]:
    """The paths whose answers are in a folder of Parquet files. A file that a crash cut short is
    removed: nobody could read it, and its images will be done again.

    Raises OutputError when the folder holds Parquet files without a column `path`.
    """
    selector = pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True)
    files = filesystem.get_file_info(selector)
    done: set[str] = set()
    for file in (file for file in files if file.path.endswith(".parquet")):
        with filesystem.open_input_file(file.path) as content:
            # A Parquet file ends with these letters; they are written last.
            whole = file.size >= 12 and content.read_at(4, file.size - 4) == b"PAR1"
            if whole:
                table = pyarrow.parquet.ParquetFile(content).read(columns=["path"])
        if not whole:
            filesystem.delete_file(file.path)
        elif "path" not in table.column_names:
            raise OutputError(f"{file.path} holds no answers of this job; choose another output.")
        else:
            done.update(table["path"].to_pylist())
    return done
