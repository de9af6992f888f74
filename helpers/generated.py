"""Generated stand-ins for Imagenette photographs, for machines without data and network.

Nobody would take these pictures for photographs. What they share with photographs is what a
batch-inference pipeline pays for: the spread of file sizes and shapes, chroma subsampling,
grey-scale images among the color ones, and the CPU time it takes to decode them. Each of the ten
classes has its own colors and its own motif, so that a network sees different things.

Picture `number` depends on `number` alone: its bytes are the same in every run with the same
Pillow, however many pictures are asked for.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

# Part of the name of the cache folder: raise it whenever the pictures change.
VERSION = 1

# What was measured on 200 full-size ImageNet photographs, the model for the pictures made here.
RECORDED = {
    "images": 200,
    "mean_bytes": 106_844,
    "bytes_5_percent": 16_456,
    "bytes_95_percent": 212_685,
    "median_size": (500, 375),
    "mean_pixels": 195_078,
    "grey_fraction": 0.045,
    "full_chroma_fraction": 0.73,
}

# File size in bytes at each quantile, read off the same photographs.
_QUANTILES = np.array(
    [0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
    + [0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.985, 0.993, 1]
)
_BYTES = 1e3 * np.array(
    [2.1, 2.8, 5.5, 16.5, 22.7, 29.0, 38.8, 60.3, 75.0, 86.8, 101.4]
    + [116.5, 131.2, 155.0, 176.4, 214.0, 241.0, 330.0, 450.0, 611.0]
)

_FULL, _HALVED = 0, 2  # Pillow's names for 4:4:4 and 4:2:0 chroma subsampling

# Width, height, chroma and JPEG quality that such files have, by size quantile: small files are
# web images with halved chroma, the bulk are 500-pixel photographs saved at quality 96.
_THUMBNAILS = (
    (100, 100, _HALVED, 75),
    (136, 150, _HALVED, 75),
    (213, 165, _HALVED, 80),
    (300, 241, _HALVED, 80),
)
_SMALL = (
    (240, 180, _FULL, 90),
    (300, 300, _HALVED, 85),
    (400, 300, _HALVED, 75),
    (300, 400, _HALVED, 75),
    (275, 385, _HALVED, 85),
)
_MEDIUM = (
    (500, 375, _HALVED, 75),
    (400, 291, _FULL, 85),
    (335, 500, _HALVED, 85),
    (600, 450, _HALVED, 80),
    (500, 375, _HALVED, 80),
    (380, 379, _HALVED, 85),
    (500, 333, _FULL, 85),
    (540, 358, _HALVED, 75),
)
_USUAL = (
    (500, 375, _FULL, 96),
    (500, 333, _FULL, 96),
    (375, 500, _FULL, 96),
    (500, 375, _FULL, 96),
    (500, 334, _FULL, 96),
    (500, 500, _FULL, 96),
    (500, 375, _FULL, 96),
    (333, 500, _FULL, 96),
    (500, 375, _FULL, 96),
    (500, 352, _FULL, 96),
    (640, 480, _HALVED, 88),
    (500, 375, _FULL, 96),
    (375, 500, _FULL, 96),
    (500, 375, _FULL, 96),
)
_LARGE = (
    (375, 500, _FULL, 97),
    (500, 375, _FULL, 97),
    (700, 467, _FULL, 96),
    (800, 1066, _HALVED, 90),
    (1200, 1000, _HALVED, 90),
)
_SHAPES = ((0.05, _THUMBNAILS), (0.15, _SMALL), (0.3, _MEDIUM), (0.95, _USUAL), (1.0, _LARGE))


@dataclass(frozen=True)
class Plan:
    """What picture `number` will be: `width` and `height` in pixels, `target_bytes` roughly."""

    number: int
    width: int
    height: int
    subsampling: int
    quality: int
    grey: bool
    target_bytes: float


def plan(number: int) -> Plan:
    """The size and the kind of picture `number`.

    Low-discrepancy sequences take the place of random draws, so that the first few dozen pictures
    already have nearly the distribution of all.
    """
    size = (0.65 + number * 0.7548776662466927) % 1.0
    shape = (0.15 + number * 0.5698402909980532) % 1.0
    grey = (0.40 + number * 0.7320508075688772) % 1.0 < RECORDED["grey_fraction"] / 0.5
    grey = grey and 0.15 < size < 0.65  # without color, the largest sizes are out of reach
    lows = (0.0, *(high for high, _ in _SHAPES))
    low, high, shapes = next(
        (low, high, shapes)
        for low, (high, shapes) in zip(lows, _SHAPES, strict=False)
        if size < high
    )
    if shapes in (_THUMBNAILS, _LARGE):  # here the file size goes with the number of pixels
        shape = (size - low) / (high - low)
    width, height, subsampling, quality = shapes[int(shape * len(shapes))]
    target = float(np.interp(size, _QUANTILES, _BYTES))
    return Plan(number, width, height, subsampling, quality, grey, target)


def jpeg(number: int) -> bytes:
    """Picture `number` (from 0) as the bytes of a JPEG file; its class is `number % 10`."""
    todo = plan(number)
    rng = np.random.default_rng([VERSION, number])
    planes = _scene(number % 10, todo.height, todo.width, rng)
    # More texture is more bytes: log2(bytes) grows by about 0.05 times the square of `level`,
    # the logarithm of its strength. That law finds the level for the target in a few trials.
    bits = todo.target_bytes * 8 / (todo.width * todo.height)
    texture = _texture(todo.height, todo.width, bits, rng)
    level = 11.2 + 1.3 * math.log2(bits) - 0.11 * todo.quality
    level += 0.65 * (todo.subsampling == _HALVED) + 1.4 * todo.grey
    for _ in range(4):
        level = min(max(level, 0.5), 6.0)
        data = _encode(todo, planes, texture, 2 ** (level - 0.5))
        missing = math.log2(todo.target_bytes / len(data))
        if abs(missing) < 0.17:  # within 12 percent
            break
        level = max(level**2 + missing / 0.05, 0) ** 0.5
    return data


def _encode(todo: Plan, planes: list, texture: np.ndarray, strength: float) -> bytes:
    from PIL import Image

    # Bright detail carries some color with it, as in photographs.
    shares = (1.0,) if todo.grey else (1.0, -0.16, 0.22)
    bands = [
        Image.fromarray(np.clip(plane + (share * strength) * texture, 0, 255).astype(np.uint8))
        for plane, share in zip(planes, shares, strict=False)
    ]
    picture = bands[0] if todo.grey else Image.merge("YCbCr", bands)
    buffer = io.BytesIO()
    chroma = {} if todo.grey else {"subsampling": todo.subsampling}
    picture.save(buffer, "JPEG", quality=todo.quality, **chroma)
    return buffer.getvalue()


@cache
def _tiles() -> tuple[np.ndarray, np.ndarray]:
    """Two 1024x1024 periodic fields of mean 0 and deviation 1: cloudy 1/f noise and fine grain."""
    size = 1024
    rng = np.random.default_rng(VERSION)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    fields = []
    for fall in (frequency**-1.3, np.exp(-5 * frequency**2)):
        field = np.fft.irfft2(spectrum * fall, s=(size, size))
        fields.append((field / field.std()).astype(np.float32))
    return fields[0], fields[1]


def _window(tile: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A piece of a periodic tile, at a random place and mirrored at random, shape (height, width).

    Cutting from a tile is what makes a picture cost milliseconds instead of tenths of a second.
    """
    down, right = rng.integers(0, tile.shape[0], 2)
    field = tile.take(range(down, down + height), axis=0, mode="wrap")
    field = field.take(range(right, right + width), axis=1, mode="wrap")
    return field[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]


def _texture(height: int, width: int, bits: float, rng: np.random.Generator) -> np.ndarray:
    """Fine detail of deviation about 1, uneven over the picture; grainier for more bits a pixel."""
    cloudy, grain = _tiles()
    sharpness = 1 + 0.4 * np.clip(_window(cloudy, height, width, rng), -1.6, 1.6)
    share = float(np.clip(rng.normal(0.13 * bits, 0.08), 0.1, 0.95))
    detail = (1 - share) * _window(cloudy, height, width, rng)
    detail += share * _window(grain, height, width, rng)
    return sharpness * detail


# Per class: background above, background below, motif; each as luma, blue and red difference.
_PALETTES = np.array(
    [
        [[150, 140, 110], [80, 135, 105], [170, 105, 140]],  # tench: pond greens, gold
        [[165, 110, 118], [110, 100, 112], [85, 112, 152]],  # English springer: grass, liver
        [[60, 128, 128], [95, 132, 126], [195, 122, 130]],  # cassette player: dark, silver
        [[120, 116, 132], [75, 112, 136], [150, 82, 178]],  # chain saw: bark, orange
        [[195, 146, 114], [145, 135, 122], [110, 116, 140]],  # church: sky, stone
        [[85, 124, 150], [50, 125, 140], [185, 85, 146]],  # French horn: velvet, brass
        [[170, 130, 126], [100, 128, 128], [95, 112, 98]],  # garbage truck: street, green
        [[190, 140, 120], [120, 126, 130], [100, 112, 190]],  # gas pump: forecourt, red
        [[125, 100, 108], [95, 98, 106], [222, 127, 129]],  # golf ball: lawn, white
        [[185, 158, 98], [205, 142, 112], [130, 130, 165]],  # parachute: blue sky, pink
    ],
    dtype=np.float32,
)


def _scene(kind: int, height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The picture before its texture: planes Y, Cb, Cr as uint8 (height, width).

    Painted at half the resolution, a quarter of the work; the texture hides it.
    """
    from PIL import Image

    full, short = (width, height), min(width, height)
    height, width = -(-height // 2), -(-width // 2)
    y = np.linspace(-full[1] / short, full[1] / short, height, dtype=np.float32)[:, None]
    x = np.linspace(-full[0] / short, full[0] / short, width, dtype=np.float32)[None, :]
    # Plain floats keep the arrays in float32; NumPy's own would widen them.
    right, low = rng.uniform(-0.25, 0.25, 2).tolist()
    angle, scale = rng.normal(0, 0.2), rng.uniform(0.8, 1.3)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    across = cos * (x - right) + sin * (y - low)
    down = cos * (y - low) - sin * (x - right)

    cloudy, _ = _tiles()
    light = _window(cloudy, height, width, rng)
    motif = _MOTIFS[kind](across, down, light, rng)
    upper, lower, front = _PALETTES[kind] + rng.normal(0, 7, (3, 3)).astype(np.float32)
    horizon = _edge(y - rng.uniform(-0.3, 0.5), rng.uniform(2, 8))
    planes = [upper[c] + (lower[c] - upper[c]) * horizon for c in range(3)]
    planes = [back + (front[c] - back) * motif for c, back in enumerate(planes)]
    planes[0] = planes[0] + 14 * light - 25 * motif * (across + down - 0.4)  # lit from one side
    planes[1] = planes[1] - 3 * light
    planes[2] = planes[2] + 4 * light
    small = [Image.fromarray(np.clip(plane, 0, 255).astype(np.uint8)) for plane in planes]
    return [np.asarray(plane.resize(full, Image.Resampling.BICUBIC)) for plane in small]


def _edge(distance: np.ndarray, sharpness: float) -> np.ndarray:
    """0 to 1 over a soft edge at distance 0."""
    return np.clip(0.5 + np.float32(sharpness) * distance, 0, 1)


def _ripples(x, y, light, rng):
    fish = _edge(0.9 - np.hypot(x, 2.6 * y + 0.2 * np.sin(4 * x)), 6)
    return np.maximum(fish, 0.3 + 0.3 * np.sin(rng.uniform(14, 24) * y + 2 * np.sin(3 * x)))


def _patches(x, y, light, rng):
    return _edge(1.0 - np.hypot(0.8 * x, y) + 0.2 * light, 2) * _edge(light + 0.3, 1.5)


def _panel(x, y, light, rng):
    box = _edge(0.95 - np.maximum(np.abs(x), 1.5 * np.abs(y)), 12)
    reels = np.hypot(np.abs(x) - 0.45, y)
    keys = _edge(np.sin(rng.uniform(18, 30) * x), 3) * _edge(y - 0.4, 15)
    return box * (1 - 0.8 * _edge(0.3 - reels, 12)) * (1 - 0.6 * keys) + _edge(0.1 - reels, 15)


def _teeth(x, y, light, rng):
    saw = np.abs((rng.uniform(4, 7) * (x + 0.6 * y)) % 1 - 0.5)
    return _edge(0.32 - np.abs(y - 0.15 * x) + 0.25 * saw, 9) * _edge(1.2 - np.abs(x), 9)


def _spire(x, y, light, rng):
    nave = _edge(np.minimum(0.75 - np.abs(x), y - 0.05), 12)
    tower = _edge(np.minimum(0.2 + 0.12 * np.minimum(y, 0) - np.abs(x + 0.35), y + 1.1), 15)
    windows = _edge(np.sin(rng.uniform(12, 20) * x) * np.sin(11 * y) - 0.5, 4)
    return np.maximum(nave, tower) * (1 - 0.7 * windows)


def _rings(x, y, light, rng):
    radius = np.hypot(x, y)
    tubes = 0.5 + 0.5 * np.sin(rng.uniform(18, 28) * radius + np.arctan2(y, x))
    return _edge(0.95 - radius, 7) * tubes


def _blocks(x, y, light, rng):
    out = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(4):
        left, top, half, tall = rng.uniform([-0.8, -0.5, 0.2, 0.15], [0.8, 0.5, 0.6, 0.45]).tolist()
        box = np.minimum(half - np.abs(x - left), tall - np.abs(y - top))
        out = np.maximum(out, rng.uniform(0.6, 1.1) * _edge(box, 14))
    wheels = np.hypot((x * 1.4) % 1 - 0.5, 1.4 * (y - 0.75))
    return out - 0.7 * _edge(0.25 - wheels, 12)


def _columns(x, y, light, rng):
    bars = _edge(np.sin(rng.uniform(7, 13) * x), 2.5) * _edge(1.0 - np.abs(y), 10)
    display = _edge(np.minimum(0.5 - np.abs(x), 0.2 - np.abs(y + 0.5)), 15)
    return bars * (1 - display)


def _dimples(x, y, light, rng):
    waves = rng.uniform(22, 34)
    dimples = np.sin(waves * x) * np.sin(waves * y)
    return _edge(0.75 - np.hypot(x, y), 14) * (0.8 + 0.2 * dimples)


def _canopy(x, y, light, rng):
    dome = np.hypot(x, 1.3 * (y + 0.2))
    gores = 0.65 + 0.35 * np.sin(int(rng.integers(9, 17)) * np.arctan2(x, y + 1.2))
    canopy = _edge(np.minimum(0.9 - dome, 0.1 - y), 10) * gores
    lines = _edge(0.012 - np.abs(np.abs(x) - 0.5 * (0.9 - y)), 40) * _edge(y - 0.1, 9)
    return np.maximum(canopy, lines * _edge(0.9 - y, 9))


# In the order of the palettes.
_MOTIFS = (
    _ripples,
    _patches,
    _panel,
    _teeth,
    _spire,
    _rings,
    _blocks,
    _columns,
    _dimples,
    _canopy,
)
