import io
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ray import cloudpickle

from helpers import checkpoint, events, generated, model, resnet


@pytest.fixture(scope="module", autouse=True)
def stand_in_weights():
    """These tests need no network and the same weights everywhere."""
    patch = pytest.MonkeyPatch()
    patch.setenv("COURSE_WEIGHTS", "stand-in")
    patch.delenv("RESNET50_WEIGHTS", raising=False)
    yield
    patch.undo()


def photo(width=320, height=240, seed=0) -> Image.Image:
    """Something with areas, edges and texture, different for each seed."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (2, 5, 13, 40):
        noise = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        way = random.choice([Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
        image += np.asarray(Image.fromarray(noise).resize((width, height), way)) * random.random()
    return Image.fromarray((255 * image / image.max()).astype(np.uint8))


def encoded(image: Image.Image, format="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    return encoded(photo(), exif=exif)


IMAGES = {
    "photo": encoded(photo(500, 375)),
    "upright": encoded(photo(375, 500)),
    "odd size": encoded(photo(501, 333)),
    "already right": encoded(photo(232, 232)),
    "tiny": encoded(photo(10, 10)),
    "one pixel": encoded(photo(1, 1)),
    "wide": encoded(photo(900, 30)),
    "tall": encoded(photo(7, 300)),
    "grey": encoded(photo().convert("L")),
    "CMYK": encoded(photo().convert("CMYK")),
    "palette PNG": encoded(photo().convert("P"), "PNG"),
    "palette with transparency": encoded(photo().convert("P"), "PNG", transparency=3),
    "RGBA": encoded(photo().convert("RGBA"), "PNG"),
    "grey with alpha": encoded(photo().convert("LA"), "PNG"),
    "one bit": encoded(photo().convert("1"), "PNG"),
    "progressive": encoded(photo(), progressive=True),
    "EXIF rotation": rotated_by_exif(),
}


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [generated.jpeg(number) for number in range(16)]


@pytest.fixture(scope="module")
def batch(files) -> np.ndarray:
    return np.stack([model.preprocess(data) for data in files])


@pytest.fixture(scope="module")
def logits(batch) -> np.ndarray:
    return model.predict(model.resnet50(channels_last=True), batch)


# ---- preprocessing ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_preprocessing_equals_torchvision(kind):
    pixels = model.preprocess(IMAGES[kind])
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)
    pixels.flags.writeable = False  # as a batch from Ray
    image = Image.open(io.BytesIO(IMAGES[kind])).convert("RGB")
    expected = model.reference_transforms()(image)
    found = model.normalize(pixels[None])
    assert found.is_contiguous() and found.dtype == torch.float32
    assert torch.equal(found[0], expected)
    last = model.normalize(pixels[None], channels_last=True)
    assert torch.equal(last, found)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_the_steps_make_up_preprocess():
    image = model.center_crop(model.resize(model.decode(IMAGES["odd size"])))
    assert image.size == (224, 224)
    assert np.array_equal(np.asarray(image), model.preprocess(IMAGES["odd size"]))


def test_exif_is_ignored():
    assert model.decode(IMAGES["EXIF rotation"]).size == (320, 240)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", IMAGES["photo"][:5000], IMAGES["palette PNG"][:500], b"\xff\xd8\xff"],
    ids=["empty", "text", "cut JPEG", "cut PNG", "only a start"],
)
def test_broken_bytes_are_a_value_error(data):
    with pytest.raises(ValueError, match=f"not a readable image .{len(data):,} bytes.: "):
        model.preprocess(data)


def test_an_image_like_a_thread_is_a_value_error():
    with pytest.raises(ValueError, match="too thin"):
        model.preprocess(encoded(photo(3000, 2)))


def test_tasks_that_only_decode_import_no_torch():
    code = f"""
import sys
from pathlib import Path
from helpers import model
model.preprocess({IMAGES["tiny"]!r})
assert not {{"torch", "torchvision", "ray", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_imports_no_torchvision():
    model.weights()
    code = """
import sys
from pathlib import Path
from helpers import model
model.resnet50()
assert "torchvision" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the network --------------------------------------------------------------------------------


def test_the_network_is_torchvisions(batch):
    from torchvision.models import resnet50

    theirs = resnet50()
    ours = resnet.empty()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = model.normalize(batch[:2])
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_reference_logits_agree(tmp_path):
    paths = []
    for seed in range(3):
        paths.append(str(tmp_path / f"{seed}.JPEG"))
        (tmp_path / f"{seed}.JPEG").write_bytes(encoded(photo(seed=seed)))
    reference = model.reference_logits(paths)
    assert list(reference) == paths
    crops = np.stack([model.preprocess(Path(path).read_bytes()) for path in paths])
    found = model.predict(model.resnet50(), crops)
    for path, row in zip(paths, found, strict=True):
        assert reference[path].shape == (1000,) and reference[path].dtype == np.float32
        assert np.abs(reference[path] - row).max() < 1e-3


def test_options_convert_the_model(batch, logits):
    net = model.resnet50("bfloat16", channels_last=True)
    assert not net.training
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    tensor = model.as_input(net, batch[:2])
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.as_input(net, model.normalize(batch[:2])), tensor)
    found = model.predict(net, batch[:4])
    assert found.dtype == np.float32 and found.shape == (4, 1000)
    assert np.abs(found - logits[:4]).max() < 1
    with pytest.raises(ValueError, match="int8"):
        model.resnet50("int8")


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-3), ("bfloat16", 1.0)])
def test_folded_batch_norm_gives_the_same_answers(precision, tolerance, batch, logits):
    net = model.resnet50(precision, channels_last=True, fold_batch_norm=True)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {p.dtype for p in net.parameters()} == {getattr(torch, precision)}
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(model.predict(net, batch) - logits).max() < tolerance
    assert not np.array_equal(model.predict(net, batch[:1]), logits[:1])  # another way of rounding


def counts_of(function) -> dict[str, int]:
    before = events.totals()
    function()
    return dict(events.totals() - before)


def test_events_count_the_use(batch):
    assert counts_of(lambda: model.resnet50())["model_constructions"] == 1
    net = model.resnet50()
    found = counts_of(lambda: [model.predict(net, batch[:n]) for n in (1, 2, 2)])
    assert found == {
        "forward_passes": 3,
        "images_through_model": 5,
        "batch_size:1": 1,
        "batch_size:2": 2,
    }
    found = counts_of(lambda: net(model.normalize(batch[:1])))
    assert found["forward_passes_with_autograd"] == 1
    fast = model.resnet50(channels_last=True)
    found = counts_of(lambda: model.predict(fast, batch[:2]))
    assert found["forward_passes_channels_last"] == 1
    assert "forward_passes_with_autograd" not in found


def test_a_pickled_model_still_works_and_counts(batch, logits):
    sent = cloudpickle.dumps(model.resnet50(channels_last=True))
    assert len(sent) > 90e6  # with its weights, not with the name of a file
    net = pickle.loads(sent)
    assert counts_of(lambda: model.predict(net, batch[:2]))["forward_passes"] == 1
    assert np.allclose(model.predict(net, batch[:2]), logits[:2], atol=1e-3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("where", ["main", "thread"])  # which have heaps of different kinds
def test_tuned_memory_is_not_asked_for_again(where):
    code = """
import resource, sys, threading
from helpers import model
if sys.argv[1] == "tuned":
    model.tune_memory()
def layers():
    [b"x" * (size << 20) for size in (16, 17, 18, 19, 20)] + [b"x" * (5 << 20)]
def count():
    layers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        layers()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "main":
    count()
else:
    threading.Thread(target=count).start()
"""
    faults = {}
    for how in ("tuned", "plain"):
        command = [sys.executable, "-c", code, how, where]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["plain"] > 10_000  # 95 MB in pages of 4 kB, five times
    assert faults["tuned"] < 1000


def _only_those_who_ask_get_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text()


@pytest.mark.skipif(not _only_those_who_ask_get_huge_pages(), reason="needs Linux with madvise")
def test_tuned_memory_is_in_huge_pages():
    code = """
import sys
from pathlib import Path
from helpers import model
import torch
if sys.argv[1] == "tuned":
    model.tune_memory()
ones = torch.ones(64 << 20, dtype=torch.uint8)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")))
"""
    kb = {}
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for how in ("tuned", "plain"):
        command = [sys.executable, "-c", code, how]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
        kb[how] = int(done.stdout)
    assert kb["plain"] == 0
    assert kb["tuned"] > 32 << 10


# ---- the stand-in -------------------------------------------------------------------------------


def test_the_stand_in_is_the_same_everywhere():
    weights = model.weights()
    assert weights.kind == "stand-in" and not weights.meaningful
    assert "mean nothing" in weights.description
    # A change of these numbers needs a new file name in helpers/checkpoint.py.
    assert weights.fingerprint == "42866665f890"


def test_the_stand_in_tells_images_apart(logits):
    assert len(set(logits.argmax(1))) >= 6, "one class for nearly everything"
    within, across = logits.std(1).mean(), logits.std(0).mean()
    assert 1 < within < 8
    assert across > 0.3 * within, "a constant dominates the logits"


def test_the_stand_in_notices_wrong_preprocessing(files, batch, logits):
    net = model.resnet50(channels_last=True)
    squashed = np.stack([np.asarray(model.decode(data).resize((224, 224))) for data in files])
    wrong = {
        "swapped colors": model.predict(net, batch[..., ::-1].copy()),
        "no /255": model.predict_tensor(net, model.normalize(batch) * 255),
        "squashed": model.predict(net, squashed),
    }
    for name, found in wrong.items():
        same = found.argmax(1) == logits.argmax(1)
        assert same.mean() < 0.9, f"{name}: nearly all answers stay"
        grey = (batch == batch[..., :1]).all(axis=(1, 2, 3)) & (name == "swapped colors")
        moved = np.abs(found - logits).max(axis=1)
        assert moved[~grey].min() > 0.5, f"{name}: an image kept its logits"


def test_labels_say_that_they_mean_nothing(logits):
    labels = model.label(logits[:2])
    assert len(labels) == 2
    assert all("stand-in" in label for label in labels)


def test_classes_match_the_categories():
    names = model.categories()
    assert len(names) == 1000
    assert len(model.CLASSES) == 10
    for found in model.CLASSES.values():
        assert names[found.index] == found.name


# ---- the choice of weights ----------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """An empty cache, nothing decided, and no network."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("COURSE_WEIGHTS", raising=False)
    monkeypatch.delenv("RESNET50_WEIGHTS", raising=False)
    probes = []
    monkeypatch.setattr(checkpoint, "_reachable", lambda url: probes.append(url) or False)
    monkeypatch.setattr(resnet, "stand_in", lambda: resnet.ResNet50().state_dict())
    return probes


def test_a_file_of_ones_own_wins(no_weights, tmp_path, monkeypatch):
    torch.manual_seed(1)
    own = resnet.ResNet50().state_dict()
    torch.save(own, tmp_path / "own.pt")
    monkeypatch.setenv("RESNET50_WEIGHTS", str(tmp_path / "own.pt"))
    weights = model.weights()
    assert (weights.kind, weights.meaningful) == ("file", True)
    assert "own.pt" in weights.description
    assert str(tmp_path) not in str(weights.to_dict())
    assert torch.equal(model.resnet50().fc.weight, own["fc.weight"])
    assert not no_weights, "looked for a network"
    # The same numbers in another format are the same weights.
    torch.save(own, tmp_path / "own.pt", _use_new_zipfile_serialization=False)
    assert model.weights().fingerprint == weights.fingerprint
    own["fc.bias"][0] += 1
    torch.save(own, tmp_path / "own.pt")
    assert model.weights().fingerprint != weights.fingerprint


@pytest.mark.parametrize("content", ["missing", "text", "keys", "shapes", "list"])
def test_an_unusable_file_is_a_clear_error(no_weights, tmp_path, monkeypatch, content):
    path = tmp_path / "own.pt"
    monkeypatch.setenv("RESNET50_WEIGHTS", str(path))
    if content == "text":
        path.write_text("no weights")
    elif content == "keys":
        torch.save({"weight": torch.zeros(1)}, path)
    elif content == "shapes":
        torch.save(resnet.ResNet50().state_dict() | {"fc.bias": torch.zeros(10)}, path)
    elif content == "list":
        torch.save([1, 2], path)
    with pytest.raises(model.ModelError, match="own.pt") as error:
        model.weights()
    assert len(str(error.value)) < 1000
    with pytest.raises(model.ModelError):
        model.resnet50()


def test_without_a_network_the_stand_in_is_made_once(no_weights):
    assert model.weights().kind == "stand-in"
    assert len(no_weights) == 1
    checkpoint.os.environ.pop("COURSE_WEIGHTS")
    resnet.stand_in = None  # making it a second time would fail
    assert model.weights().kind == "stand-in"
    model.resnet50()
    assert len(no_weights) == 1, "a recent failure was tried again"


def test_a_cached_download_is_found(no_weights, tmp_path, monkeypatch):
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(resnet.ResNet50().state_dict(), folder / "resnet50-11ad3fa6.pth")
    weights = model.weights()
    assert (weights.kind, weights.meaningful) == ("torchvision", True)
    assert not no_weights
    # The decision holds in other processes, whatever their cache has.
    monkeypatch.setenv("COURSE_WEIGHTS", "stand-in")
    assert model.weights().kind == "stand-in"


def test_insisting_on_the_real_weights_fails_without_them(no_weights, monkeypatch):
    monkeypatch.setenv("COURSE_WEIGHTS", "torchvision")
    for _ in range(2):
        with pytest.raises(model.ModelError, match="neither in a cache nor downloadable"):
            model.weights()
    assert len(no_weights) == 2, "who insists gets another try"


def test_a_download_is_checked(no_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "_reachable", lambda url: True)
    served = io.BytesIO(b"an error page, perhaps")
    monkeypatch.setattr(checkpoint.urllib.request, "urlopen", lambda url, timeout: served)
    assert model.weights().kind == "stand-in"
    assert "checksum" in capsys.readouterr().err
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "resnet50-11ad3fa6.pth" not in left
    assert not [name for name in left if name.endswith(".part")]


def test_the_probe_does_not_wait_for_names(monkeypatch):
    import threading

    hang = threading.Event()

    def connect(*_, **__):
        hang.wait(30)
        raise OSError

    monkeypatch.setattr(checkpoint.socket, "create_connection", connect)
    assert not checkpoint._reachable("https://example.invalid/x", seconds=0.1)
    hang.set()
