"""Where the images come from, and saying so.

`images()` tries four sources in turn and announces the one it took: the folder in
`IMAGENETTE_DIR`, the copy in the cache, the public bucket, and pictures made on the spot. Paths
come back with the classes interleaved, so that every prefix of the list is balanced.

| environment variable | meaning |
|---|---|
| `COURSE_IMAGES` | how many images, 64 by default; two for each CPU at least |
| `IMAGENETTE_DIR` | a folder in the layout `train/<synset>/*.JPEG` |
| `COURSE_CACHE` | where copies are kept, `~/.cache/ray-data-course` by default |
| `COURSE_S3_URI` | another bucket in Imagenette's layout, or `off` for none |
| `COURSE_S3_ENDPOINT` | another S3 server, such as `http://127.0.0.1:5000` |
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from helpers.bucket import Bucket, Unreachable

DEFAULT_COUNT = 64
EXTENSIONS = (".jpeg", ".jpg")
# Imagenette's ten classes by their ImageNet synset, in the order of the folders.
SYNSETS = (
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
)

PROBE_AGAIN_SECONDS = 600.0  # every notebook is a process of its own: not all should wait
PROGRESS_SECONDS = 2.0
NAMED_IN_PRINT = 5  # skipped files named in the announcement; `skipped` has all

_WHERE = {
    "folder": "folder IMAGENETTE_DIR",
    "cache": "cached copy of the bucket",
    "s3": "public bucket",
    "generated": "generated sample",
}


class DataError(Exception):
    """The images asked for cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class ImageSource:
    """The images of a run.

    kind: "folder", "cache", "s3" or "generated".
    root: the folder that holds `train/`.
    paths: absolute paths, in a fixed order, classes interleaved.
    skipped: (path, reason) of each file met on the way that is no readable image.
    asked: how many images were asked for; `len(source)` is how many there are.
    bytes: the sum of the file sizes.
    note: why an earlier source did not do, or "".
    """

    kind: str
    root: Path
    paths: list[str]
    skipped: list[tuple[str, str]]
    asked: int
    bytes: int
    note: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def is_real(self) -> bool:
        """Whether these are photographs."""
        return self.kind != "generated"

    @property
    def description(self) -> str:
        """Short form for figures: "64 images, folder IMAGENETTE_DIR"."""
        plural = "" if len(self) == 1 else "s"
        return f"{len(self)} image{plural}, {_WHERE[self.kind]}"

    def label(self, path: str) -> str:
        """The synset of an image, which is the name of its folder."""
        return Path(path).parent.name

    def to_dict(self) -> dict:
        """Provenance for JSON; names files relative to `root`, never where this machine has them.

        `fingerprint` is the same exactly where names, sizes and order of the images are.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{self._name(path)} {os.path.getsize(path)}\n".encode())
        return {
            "kind": self.kind,
            "description": self.description,
            "is_real": self.is_real,
            "asked": self.asked,
            "count": len(self),
            "bytes": self.bytes,
            "classes": len({self.label(path) for path in self.paths}),
            "skipped": [[self._name(path), reason] for path, reason in self.skipped],
            "note": self.note,
            "fingerprint": digest.hexdigest()[:16],
        }

    def _name(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def _announcement(self, why: str = "") -> str:
        line = f"Images: {len(self)} of the {self.asked} asked for{why}, {_WHERE[self.kind]}, "
        line += f"{self.bytes / 1e6:.1f} MB"
        if self.note:
            line += f"; {self.note}"
        if self.skipped:
            named = [f"{self._name(p)} ({why})" for p, why in self.skipped[:NAMED_IN_PRINT]]
            more = len(self.skipped) - len(named)
            line += f"; skipped {len(self.skipped)} unreadable: {', '.join(named)}"
            line += f" and {more} more" if more else ""
        return line + "."


def images(count: int | None = None) -> ImageSource:
    """Find `count` images and print which: one line, and another if they are too few for the CPUs.

    Without a count: `COURSE_IMAGES`, else 64, and `enough` for the Ray that runs. A source with
    fewer images than that gives what it has. Unreadable files are replaced by the next ones in the
    order. The first use may download or generate, which prints progress.

    Raises DataError when the count or `IMAGENETTE_DIR` is unusable; a folder that was named is
    never replaced by another source.
    """
    asked = wanted = _count(count)
    if count is None:
        asked = enough(wanted)
    if os.environ.get("IMAGENETTE_DIR"):
        source = _from_folder(os.environ["IMAGENETTE_DIR"], asked)
    else:
        source = _from_cache_or_elsewhere(asked)
    why = "" if asked == wanted else f" ({wanted} are too few for so many CPUs)"
    print(source._announcement(why), flush=True)
    if count is None and len(source) < (least := enough(0)):
        print(
            f"Fewer than two images for each of {least // 2} CPUs: Ray Data splits such reads "
            "(lesson 03, T6), and cells that check a plan can fail. Use more images, or give Ray "
            "fewer CPUs (COURSE_CPUS, at least 2).",
            flush=True,
        )
    return source


def enough(count: int) -> int:
    """`count`, or two for each CPU of the running Ray if that is more: of fewer files Ray Data
    splits what the read returns, and what is split is not fused (lesson 03, T6)."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return count
    return max(count, 2 * int(ray.cluster_resources().get("CPU", 0)))


def _count(count: int | None) -> int:
    name, value = "count", count
    if count is None:
        name, value = "COURSE_IMAGES", os.environ.get("COURSE_IMAGES") or DEFAULT_COUNT
    try:
        if isinstance(value, (bool, float)) or int(value) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"{name} is {value!r}; set it to a whole number of images, 1 or more."
        ) from None
    return int(value)


def _from_cache_or_elsewhere(asked: int) -> ImageSource:
    cache = Path(os.environ.get("COURSE_CACHE") or "~/.cache/ray-data-course").expanduser()
    cache = cache.absolute()
    try:
        bucket = Bucket.configured()
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if bucket is None:
            return _generated(cache, asked, "no real photographs: COURSE_S3_URI is off")
        copy = _Copy(bucket, cache)
        cached, is_enough = copy.cached(asked)
        if is_enough:
            return cached
        try:
            return copy.completed(asked)
        except Unreachable as why:
            reason = f"the bucket {why}"
        cached, _ = copy.cached(asked)  # with what arrived before the bucket failed
        if cached.paths:
            return replace(cached, note=reason)
        return _generated(cache, asked, f"no real photographs: {reason}")
    except OSError as error:
        raise DataError(
            f"The image cache {cache} cannot be used ({error.strerror or error}); "
            "set COURSE_CACHE to a folder that can be written to and has room."
        ) from error


def _select(
    kind: str,
    root: Path,
    order: list[str],
    asked: int,
    fetch: Callable[[list[str]], None] | None = None,
    note: str = "",
) -> ImageSource:
    """The first `asked` good images of `order`, looking at no more files than that takes.

    `fetch` puts the files it is given in place before they are looked at.
    """
    paths: list[str] = []
    skipped: list[tuple[str, str]] = []
    tried = 0
    while len(paths) < asked and tried < len(order):
        files = order[tried : tried + asked - len(paths)]
        tried += len(files)
        if fetch:
            fetch(files)
        for path in files:
            reason = problem(path)
            if reason:
                skipped.append((path, reason))
            else:
                paths.append(path)
    size = sum(os.path.getsize(path) for path in paths)
    return ImageSource(kind, root, paths, skipped, asked, size, note)


def _interleaved(classes: dict[str, list[str]]) -> list[str]:
    """One of each class, then the next of each, classes and files sorted by name."""
    rounds = zip_longest(*(sorted(classes[name]) for name in sorted(classes)))
    return [path for one_of_each in rounds for path in one_of_each if path is not None]


def problem(path: str) -> str | None:
    """Why a file is no readable image, or None.

    Reads a few kilobytes of a healthy JPEG; decodes only what looks wrong.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "empty file"
            # The marker that ends a JPEG is missing from a truncated one. Some programs write a
            # few bytes after it, and other formats have no such marker: those are decoded.
            file.seek(max(0, size - 64))
            ended = b"\xff\xd9" in file.read()
            file.seek(0)
            with Image.open(file) as image:
                if image.format != "JPEG" or not ended:
                    image.load()
    except FileNotFoundError:
        return "missing"
    except UnidentifiedImageError:
        return "not an image"  # Pillow's own message has this machine's path in it
    except OSError as error:
        if error.errno is not None:
            return f"cannot be read: {error.strerror}"
        return "truncated" if "truncated" in str(error) else f"damaged: {error}"
    except Exception as error:  # Pillow raises many kinds on damaged headers
        return f"damaged: {type(error).__name__}"
    return None


# --- a folder of one's own ---------------------------------------------------------------------


def _from_folder(value: str, asked: int) -> ImageSource:
    root = Path(value).expanduser().absolute()
    layout = "It must hold train/<synset>/*.JPEG, as Imagenette does."
    here = f"IMAGENETTE_DIR is {value}"
    if "://" in value:
        raise DataError(f"{here}, but it must be a local folder; for a bucket set COURSE_S3_URI.")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{here}, which {what} (looked at {root}). {layout}")
    try:
        classes = _scan(root / "train")
        if not classes:
            raise DataError(f"{here}, which has no images in that layout. {layout} {_hint(root)}")
        source = _select("folder", root, _interleaved(classes), asked)
    except OSError as error:
        raise DataError(f"{here}, which cannot be read: {error.strerror or error}.") from error
    if not source.paths:
        path, reason = source.skipped[0]
        raise DataError(
            f"{here}, where none of {len(source.skipped)} files is a readable image "
            f"({source._name(path)}: {reason}, ...). Copy the data again, or unset the variable."
        )
    return source


def _scan(train: Path) -> dict[str, list[str]]:
    """The image files under `train`, by class folder; hidden files are none."""
    classes: dict[str, list[str]] = {}
    for folder in sorted(train.iterdir()) if train.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            files = [entry.path for entry in os.scandir(folder) if _is_image_name(entry.name)]
            if files:
                classes[folder.name] = files
    return classes


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _hint(root: Path) -> str:
    if root.name == "train" and _scan(root):
        return f"Set it to the folder above: {root.parent}"
    for child in sorted(root.iterdir()):
        if _scan(child / "train"):
            return f"Set it to the folder inside: {child}"
    if _scan(root):
        return "It holds class folders itself: move them into a folder named train."
    if any(_is_image_name(entry.name) for entry in os.scandir(root)):
        return "It holds images without class folders: sort them into train/<synset>/."
    return "It is empty of JPEG files."


# --- the cache, filled from the public bucket --------------------------------------------------


@dataclass(frozen=True)
class _Copy:
    """The part of the bucket that is already here, and the way to get more of it.

    `root/index.json` keeps the listing. It makes the order the same whatever has been downloaded,
    and spares later runs the listing.
    """

    bucket: Bucket
    cache: Path

    @property
    def root(self) -> Path:
        return self.cache / self.bucket.name / Path(self.bucket.prefix).parent

    def order(self) -> list[str]:
        """Local paths of all images of the bucket, here or not; empty before the first listing."""
        train = self.root / "train"
        try:
            listing = json.loads((self.root / "index.json").read_text())
            return _interleaved(
                {name: [str(train / name / file) for file in listing[name]] for name in listing}
            )
        except (FileNotFoundError, ValueError, TypeError):
            return []  # never listed, or not a listing: it will be made again

    def cached(self, asked: int) -> tuple[ImageSource, bool]:
        """What is here, and whether it is what a download of `asked` images would give."""
        order = self.order()
        present = [path for path in order if os.path.exists(path)]
        found = _select("cache", self.root, present, asked)
        # A gap before the last image means that a download was interrupted; a damaged copy, that
        # the disk lost something. Both are fetched again if possible.
        return found, found.paths != [] and found.paths == order[:asked]

    def completed(self, asked: int) -> ImageSource:
        """The first `asked` images of the bucket, downloading those that are not here.

        Raises Unreachable.
        """
        if why := self._given_up():
            raise Unreachable(f"{why}, found in the last {PROBE_AGAIN_SECONDS / 60:.0f} minutes")
        try:
            self.bucket.connect()
            if not self.order():
                self._list()
        except Unreachable as why:
            _write(self._marker, json.dumps({repr(self.bucket): str(why)}).encode())
            raise
        self._marker.unlink(missing_ok=True)
        source = _select("s3", self.root, self.order(), asked, self._fetch)
        if not source.paths:
            raise Unreachable("has no readable images")
        return source

    def _list(self) -> None:
        found = self.bucket.listing(SYNSETS)
        listing = {name: [*filter(_is_image_name, files)] for name, files in found.items()}
        if not any(listing.values()):
            raise Unreachable("has no images in Imagenette's layout")
        _write(self.root / "index.json", json.dumps(listing).encode())

    def _fetch(self, paths: list[str]) -> None:
        """Download what is missing or damaged of `paths`."""
        train = self.root / "train"
        wanted = [Path(path).relative_to(train).as_posix() for path in paths if problem(path)]
        steps = _progress(len(wanted), "downloaded")
        for _ in self.bucket.read(wanted, lambda name, data: _write(train / name, data)):
            next(steps)

    @property
    def _marker(self) -> Path:
        return self.cache / "bucket-out-of-reach.json"

    def _given_up(self) -> str | None:
        """Why the bucket was given up a moment ago, if it was."""
        try:
            if 0 <= time.time() - self._marker.stat().st_mtime < PROBE_AGAIN_SECONDS:
                return json.loads(self._marker.read_text()).get(repr(self.bucket))
        except (FileNotFoundError, ValueError, AttributeError):
            pass  # no marker, or not one of ours
        return None


# --- the generated sample ----------------------------------------------------------------------


def _generated(cache: Path, asked: int, note: str) -> ImageSource:
    from helpers import generated

    root = cache / f"generated-{generated.VERSION}"
    numbers = {}
    for number in range(asked):
        synset = SYNSETS[number % len(SYNSETS)]
        numbers[str(root / "train" / synset / f"generated_{number:06d}.JPEG")] = number

    def make(files: list[str]) -> None:
        missing = [path for path in files if problem(path)]
        steps = _progress(len(missing), "generated")
        for path in missing:
            _write(Path(path), generated.jpeg(numbers[path]))
            next(steps)

    return _select("generated", root, list(numbers), asked, make, note)


# --- small things ------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there, also when interrupted or done by two at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _progress(total: int, verb: str) -> Iterator[None]:
    """Advance by `next` once for each image done; prints a line now and then, if it takes long."""
    last = time.monotonic()
    for done in range(1, total + 1):
        if time.monotonic() - last > PROGRESS_SECONDS and done < total:
            last = time.monotonic()
            print(f"Images: {done} of {total} {verb} ...", flush=True)
        yield
