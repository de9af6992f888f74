"""Which weights ResNet50 gets: a file of one's own, torchvision's, or the seeded stand-in."""

import hashlib
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_FILE = "resnet50-11ad3fa6.pth"  # torchvision's; the name carries the start of its SHA-256
_STAND_IN = "resnet50-stand-in-v1.pt"  # a new number whenever resnet.stand_in() changes
_RETRY_AFTER_S = 3600  # how long a failed download is remembered


class ModelError(Exception):
    """The weights cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """Which weights `resnet50()` loads. `meaningful`: whether their labels mean anything."""

    kind: str  # "torchvision", "file" or "stand-in"
    description: str
    summary: str  # the shortest form, for captions
    meaningful: bool
    fingerprint: str  # of the numbers, so equal on every machine that has the same weights
    path: Path = field(repr=False)

    def to_dict(self) -> dict:
        """For provenance, without the path."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def weights() -> Weights:
    """Decide which weights this run uses. Call it in the driver before the first pipeline.

    The first that works: the file in RESNET50_WEIGHTS, torchvision's (from a cache, or downloaded
    once), the seeded stand-in (made once). A download that fails is not tried again for an hour.
    The environment variable COURSE_WEIGHTS holds the decision for other processes; set it to
    `stand-in` or `torchvision` to insist. Raises ModelError when the choice cannot be used.
    """
    choice = decide()
    stat = choice.path.stat()
    print_of_numbers = _fingerprint(choice.path, stat.st_mtime_ns, stat.st_size)
    return Weights(choice.kind, *_describe(choice), print_of_numbers, choice.path)


def decide() -> "_Choice":
    """The decision alone, without looking into the file: a driver need not wait for torch."""
    choice = choose(download=True)
    if choice.kind != "file":
        os.environ["COURSE_WEIGHTS"] = choice.kind
    return choice


class _Choice(NamedTuple):
    kind: str
    path: Path


def choose(download: bool = False) -> _Choice:
    """Find the file. Cheap once the driver has called `weights()`: workers only look up names."""
    if given := os.environ.get("RESNET50_WEIGHTS"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise ModelError(f"RESNET50_WEIGHTS={given}: there is no such file on this machine.")
        return _Choice("file", path)
    insisted = os.environ.get("COURSE_WEIGHTS")
    stand_in = _cache() / _STAND_IN
    if insisted != "stand-in":
        if path := _torchvision_file():
            return _Choice("torchvision", path)
        may_download = download or insisted == "torchvision" or not stand_in.exists()
        if may_download and (path := _download(insisted == "torchvision")):
            return _Choice("torchvision", path)
        if insisted == "torchvision":
            raise ModelError(
                f"COURSE_WEIGHTS=torchvision, but {_FILE} is neither in a cache nor downloadable. "
                "Unset the variable, or point RESNET50_WEIGHTS at a copy of the file."
            )
    if not stand_in.exists():
        _make_stand_in(stand_in)
    return _Choice("stand-in", stand_in)


def _describe(choice: _Choice) -> tuple[str, str, bool]:
    """Description, summary, meaningful."""
    if choice.kind == "file":
        name = choice.path.name
        return f"ResNet50, weights from {name} (RESNET50_WEIGHTS)", f"weights {name}", True
    if choice.kind == "torchvision":
        return "ResNet50, torchvision's weights IMAGENET1K_V2", "weights IMAGENET1K_V2", True
    stand_in = "stand-in weights (seeded, not trained: its labels mean nothing)"
    return f"ResNet50, {stand_in}", "stand-in weights", False


def load(model, path: Path):
    """Put the state dict in the file into a model without numbers. The file is mapped, not read:
    the worker processes of one machine share its pages."""
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file in the format of before 2020 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state, assign=True)
    except Exception as error:
        reason = "; ".join(str(error).strip().splitlines()[:3])[:500]
        raise ModelError(
            f"{path} holds no state dict of a ResNet50 with 1000 classes ({reason}). Save one with "
            "torch.save(model.state_dict(), file), or delete the file if it was cut short."
        ) from error
    return model


def _cache() -> Path:
    return Path(os.environ.get("COURSE_CACHE") or "~/.cache/ray-data-course").expanduser()


def _torchvision_file() -> Path | None:
    home = os.environ.get("TORCH_HOME")
    home = home or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    hub = Path(home).expanduser() / "hub" / "checkpoints"
    return next((f / _FILE for f in (_cache(), hub) if (f / _FILE).is_file()), None)


def _make_stand_in(path: Path) -> None:
    import torch
    from filelock import FileLock  # comes with torch

    from helpers import resnet

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with _atomic(path) as temporary:
                torch.save(resnet.stand_in(), temporary)


class _atomic:
    """Write to the yielded temporary file; it gets its name only when it is complete."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> str:
        descriptor, self.temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        os.close(descriptor)
        return self.temporary

    def __exit__(self, error, *_) -> None:
        if error is None:
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)


def _download(insist: bool) -> Path | None:
    """Fetch torchvision's file into the cache, or None. Remembers a failure for a while."""
    from filelock import FileLock

    path, failed = _cache() / _FILE, _cache() / f"{_FILE}.failed"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        if failed.exists() and time.time() - failed.stat().st_mtime < _RETRY_AFTER_S and not insist:
            return None
        from torchvision.models import ResNet50_Weights

        url = ResNet50_Weights.IMAGENET1K_V2.url
        if not _reachable(url):
            failed.touch()
            return None
        try:
            print(f"Downloading {_FILE} (98 MB, once)", file=sys.stderr)
            with _atomic(path) as temporary, urllib.request.urlopen(url, timeout=10) as source:
                digest = hashlib.sha256()
                with open(temporary, "wb") as target:
                    while chunk := source.read(1 << 20):
                        digest.update(chunk)
                        target.write(chunk)
                if not digest.hexdigest().startswith(path.stem.rpartition("-")[2]):
                    raise OSError("the checksum does not match")
        except OSError as error:
            print(f"Download failed ({error}); going on without it", file=sys.stderr)
            failed.touch()
            return None
    return path


def _reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether a connection to the host (or the proxy in its place) opens within `seconds`.

    In a thread, since looking up a name has no timeout of its own and can take far longer.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    target = urllib.parse.urlsplit(urllib.request.getproxies().get(scheme, url))
    done = threading.Event()

    def connect():
        try:
            address = (target.hostname, target.port or 443)
            socket.create_connection(address, timeout=seconds).close()
            done.set()
        except OSError:
            pass

    threading.Thread(target=connect, daemon=True).start()
    return done.wait(seconds)


@lru_cache
def _fingerprint(path: Path, mtime_ns: int, size: int) -> str:
    """12 hex digits over names and numbers: equal for equal weights in differently packed files."""
    import torch

    from helpers import resnet

    digest = hashlib.sha256()
    state = load(resnet.empty(), path).state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].to(torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]
