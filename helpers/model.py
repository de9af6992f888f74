"""ResNet50: the network, its preprocessing, and counters for how a pipeline uses it.

Torch is imported inside the functions that need it: the tasks that decode images import this module
too, and must not pay seconds for a library that they never call.
"""

import ctypes
import io
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helpers import checkpoint, events
from helpers.checkpoint import ModelError as ModelError
from helpers.checkpoint import Weights as Weights
from helpers.checkpoint import weights

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESIZE, CROP = 232, 224


class ImageClass(NamedTuple):
    index: int  # among ImageNet's 1000
    name: str


CLASSES = {
    "n01440764": ImageClass(0, "tench"),
    "n02102040": ImageClass(217, "English springer"),
    "n02979186": ImageClass(482, "cassette player"),
    "n03000684": ImageClass(491, "chain saw"),
    "n03028079": ImageClass(497, "church"),
    "n03394916": ImageClass(566, "French horn"),
    "n03417042": ImageClass(569, "garbage truck"),
    "n03425413": ImageClass(571, "gas pump"),
    "n03445777": ImageClass(574, "golf ball"),
    "n03888257": ImageClass(701, "parachute"),
}


# ---- preprocessing ------------------------------------------------------------------------------


def decode(data: bytes):
    """An encoded image -> `PIL.Image` in RGB, whatever its mode.

    EXIF orientation is ignored, as torchvision and `read_images` ignore it.
    Raises ValueError when the bytes are no complete image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types for broken files
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"not a readable image ({len(data):,} bytes): {reason}") from error


def resize(image):
    """`PIL.Image` -> the same with its shortest side at 232 pixels, aspect kept, bilinear.

    Raises ValueError for an image thinner than 1:1000.
    """
    from PIL import Image

    width, height = image.size
    short, long = min(image.size), max(image.size)
    if long > 1000 * short:  # a few broken bytes would ask for gigabytes
        raise ValueError(f"{width}x{height} pixels: too thin to resize")
    long = int(RESIZE * long / short)
    size = (RESIZE, long) if width <= height else (long, RESIZE)
    return image.resize(size, Image.Resampling.BILINEAR)


def center_crop(image):
    """`PIL.Image` -> its middle, 224x224 pixels."""
    left, top = (round((side - CROP) / 2) for side in image.size)  # half to even, as torchvision
    return image.crop((left, top, left + CROP, top + CROP))


def resize_and_crop(image) -> np.ndarray:
    """`PIL.Image` in RGB -> uint8 (224, 224, 3), writable."""
    return np.array(center_crop(resize(image)))


def preprocess(data: bytes) -> np.ndarray:
    """An encoded image -> uint8 (224, 224, 3), RGB: shortest side to 232 pixels, center crop.

    The same pixels as `reference_transforms()` before it normalizes.
    Raises ValueError when the bytes are no complete image, or it is thinner than 1:1000.
    """
    return resize_and_crop(decode(data))


def normalize(batch: np.ndarray, channels_last: bool = False, device="cpu"):
    """uint8 (N, 224, 224, 3) -> torch.float32 (N, 3, 224, 224), as the last steps of
    `reference_transforms()`. `channels_last` sets the order in memory, not the shape.

    With a GPU as `device`, the pixels travel as uint8, a quarter of the bytes.
    """
    import torch

    # torch.tensor copies: batches from Ray are read-only views, and from_numpy warns about those.
    pixels = torch.tensor(batch, device=device).permute(0, 3, 1, 2)
    if not channels_last:
        pixels = pixels.contiguous()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def reference_transforms():
    """torchvision's own preprocessing for these weights: `PIL.Image` -> float32 (3, 224, 224)."""
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.IMAGENET1K_V2.transforms()


def reference_logits(paths: Iterable[str]) -> dict[str, np.ndarray]:
    """`{path: float32 (1000,)}` from torchvision's own network and transforms in a plain loop.

    One image at a time, float32, no Ray: the answer that every pipeline is compared with.
    """
    import torch
    from torchvision.models import resnet50 as torchvision_resnet50

    with torch.device("meta"):
        model = torchvision_resnet50()
    checkpoint.load(model, checkpoint.choose().path).float().eval()
    transform, logits = reference_transforms(), {}
    with torch.inference_mode():
        for path in paths:
            image = decode(Path(path).read_bytes())
            logits[str(path)] = model(transform(image)[None])[0].numpy()
    return logits


# ---- the model ----------------------------------------------------------------------------------


def resnet50(
    precision: str = "float32", channels_last: bool = False, fold_batch_norm: bool = False
):
    """ResNet50 on the CPU in eval mode, with `weights()`: a `torch.nn.Module`, (N, 3, 224, 224) ->
    (N, 1000) logits.

    `precision` ("float32", "bfloat16", "float16") and `channels_last` convert the model; inputs
    must match (`predict` does that). `fold_batch_norm` leaves fewer layers with the same answers
    but for rounding. Counts constructions and forward passes in `helpers.events`.
    Raises ModelError when the weights cannot be used, ValueError for another precision.
    """
    import torch

    from helpers import resnet

    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision {precision!r}: use float32, bfloat16 or float16")
    model = checkpoint.load(resnet.empty(), checkpoint.choose().path).eval()
    if fold_batch_norm:
        model = resnet.fold_batch_norm(model.float())
    model = model.to(getattr(torch, precision))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(_count_forward)
    events.emit("model_constructions")
    return model


def tune_memory() -> None:
    """Let this process keep what it frees for its next allocation, in huge pages; on Linux only.

    Each layer of a network allocates its output anew. Blocks of that size glibc returns to the
    system when they are freed, and to get them again costs a page fault for every page. And pages
    of 4 kB are many for a core to look up: PyTorch can ask for pages of 2 MiB. It reads whether it
    shall at its first allocation, so call this before there is a tensor.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's; does nothing where none are
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; see `man mallopt` and malloc.h for the numbers
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        # Each further thread allocates from heaps of 64 MiB. One that falls empty is given back as
        # well, whatever the threshold, unless as much shall stay free.
        libc.mallopt(M_TOP_PAD, 64 * 2**20)


def predict(model, batch: np.ndarray) -> np.ndarray:
    """uint8 images (N, 224, 224, 3) -> float32 logits (N, 1000), without autograd, in the model's
    own precision and memory order and on its own device."""
    return predict_tensor(model, batch)


def predict_tensor(model, images) -> np.ndarray:
    """The same for normalized images, a tensor (N, 3, 224, 224)."""
    import torch

    with torch.inference_mode():
        return model(as_input(model, images)).float().cpu().numpy()


def as_input(model, images):
    """Images, uint8 (N, 224, 224, 3) or a normalized tensor (N, 3, 224, 224), as the tensor that
    this model wants: normalized, in its precision and memory order, on its device."""
    import torch

    weight = next(parameter for parameter in model.parameters() if parameter.dim() == 4)
    order = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    if not torch.is_tensor(images):
        last = order == torch.channels_last
        images = normalize(images, channels_last=last, device=weight.device)
    return images.to(weight.device, weight.dtype, memory_format=order)


def _is_channels_last(tensor) -> bool:
    import torch

    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def label(logits: np.ndarray) -> list[str]:
    """Logits (N, 1000) -> the name of the best class of each image.

    Stand-in weights have learned nothing, and each of their names says so.
    """
    note = "" if weights().meaningful else " (stand-in: meaningless)"
    return [categories()[index] + note for index in np.argmax(logits, axis=-1)]


@lru_cache
def categories() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of the logits."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


def _count_forward(model, args) -> None:
    # A function of the module, not a closure: it is pickled by name along with the model.
    import torch

    if not args or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    images = args[0]
    events.emit("forward_passes")
    events.emit("images_through_model", len(images))
    events.emit(f"batch_size:{len(images)}")
    if torch.is_grad_enabled():
        events.emit("forward_passes_with_autograd")
    if _is_channels_last(images):
        events.emit("forward_passes_channels_last")
