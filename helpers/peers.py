"""The same job without Ray: what a pipeline has to beat before it is worth its start-up.

Each peer runs in a process of its own, so that it pays for its own imports.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from helpers import model

NAMES = ("dataloader", "daft")


def run(name: str, paths: list[str], settings, tuned: bool = False) -> dict | None:
    """Run one peer over `paths`, as it comes or `tuned` like the optimized pipeline: memory kept in
    huge pages (`model.tune_memory`), batch norm folded. None when it is not installed.

    Returns `seconds` from the start of its process to the last answer, `first_answers_s`,
    `first_answers_images`, `images`, `images_per_s`, `steady_images_per_s` and `answers`, a dict of
    path -> logits. Raises RuntimeError with its last lines when it fails.
    """
    if importlib.util.find_spec("daft" if name == "daft" else "torch") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        job, answers = Path(folder, "job.json"), Path(folder, "answers.npz")
        keys = "torch_device", "batch_size", "precision", "channels_last"
        chosen = {key: getattr(settings, key) for key in keys} | {"tuned": tuned}
        job.write_text(json.dumps({"paths": list(paths), "settings": chosen}))
        start = time.time()
        command = [sys.executable, "-m", "helpers.peers", name, str(job), str(answers)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the peer {name} failed:\n{done.stderr[-2000:]}")
        found = np.load(answers)
        logits = dict(zip(found["paths"].tolist(), found["logits"], strict=True))
    first = float(found["first_at"]) - start
    seconds = float(found["last_at"]) - start
    images, begin = len(logits), int(found["first_images"])
    return {
        "seconds": seconds,
        "first_answers_s": first,
        "first_answers_images": begin,
        "images": images,
        "images_per_s": images / seconds,
        "steady_images_per_s": (images - begin) / (seconds - first) if images > begin else None,
        "answers": logits,
    }


# --- in the process of a peer --------------------------------------------------------------------


def dataloader(paths: list[str], settings):
    """A plain PyTorch loop: workers decode, this process classifies. Yields (paths, logits)."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from helpers.device import usable_cores

    class Photos(Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return paths[index], model.preprocess(Path(paths[index]).read_bytes())

    cores = usable_cores()
    torch.set_num_threads(cores)
    net = _network(settings)
    # Here one model works with all cores: as many images for each as a replica would get.
    size = settings.batch_size * (cores if settings.torch_device == "cpu" else 1)
    loader = DataLoader(Photos(), size, num_workers=max(1, cores - 1))
    for names, crops in loader:
        yield names, model.predict(net, crops.numpy())


def daft(paths: list[str], settings):
    """Daft with a class that holds the model. Yields (paths, logits) of each part of the result."""
    import daft
    from daft import DataType

    @daft.cls
    class Classify:
        def __init__(self):
            self.net = _network(settings)

        @daft.method.batch(
            return_dtype=DataType.list(DataType.float32()), batch_size=settings.batch_size
        )
        def logits(self, path):
            files = [Path(name).read_bytes() for name in path.to_pylist()]
            crops = np.stack([model.preprocess(file) for file in files])
            return list(model.predict(self.net, crops))

    table = daft.from_pydict({"path": paths})
    table = table.with_column("logits", Classify().logits(table["path"]))
    for part in table.iter_partitions():
        columns = part.to_pydict()
        yield columns["path"], np.asarray(columns["logits"], np.float32)


def _network(settings):
    net = model.resnet50(settings.precision, settings.channels_last, settings.tuned)
    return net.to(settings.torch_device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("job", type=Path)
    parser.add_argument("answers", type=Path)
    options = parser.parse_args()
    job = json.loads(options.job.read_text())
    settings = argparse.Namespace(**job["settings"])
    if settings.tuned:
        model.tune_memory()
    names, logits, first = [], [], None
    peer = {"dataloader": dataloader, "daft": daft}[options.name]
    for part_names, part in peer(job["paths"], settings):
        first = first or (time.time(), len(part_names))
        names += part_names
        logits.append(part)
    last = time.time()
    np.savez(
        options.answers,
        paths=np.array(names),
        logits=np.concatenate(logits),
        first_at=first[0],
        first_images=first[1],
        last_at=last,
    )


if __name__ == "__main__":
    main()
