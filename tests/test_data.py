"""Where images come from: each source, the order among them, and what is said about it."""

import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from helpers import bucket, data, generated

REPOSITORY = Path(__file__).resolve().parents[1]
BUCKET = "sample-bucket"
URI = f"s3://anonymous@{BUCKET}/imagenette2/train/"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no way to a machine that is not this one."""
    for name in ("IMAGENETTE_DIR", "COURSE_IMAGES", "COURSE_S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COURSE_S3_URI", "off")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path / "cache"


def jpeg(seed: int, size=(64, 48)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def files_of(root: Path, source: data.ImageSource) -> list[str]:
    return [Path(path).relative_to(root / "train").as_posix() for path in source.paths]


# --- a folder ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of 4, 4 and 1 images."""
    root = tmp_path / "own"
    for synset, count in (("n02", 4), ("n01", 4), ("n03", 1)):
        (root / "train" / synset).mkdir(parents=True)
        for number in range(count):
            path = root / "train" / synset / f"{synset}_{number}.JPEG"
            path.write_bytes(jpeg(int(synset[1:]) * 100 + number))
    monkeypatch.setenv("IMAGENETTE_DIR", str(root))
    return root


def test_folder_interleaves_classes_in_a_fixed_order(folder):
    source = data.images(6)
    assert source.kind == "folder" and source.is_real
    assert files_of(folder, source) == [
        "n01/n01_0.JPEG",
        "n02/n02_0.JPEG",
        "n03/n03_0.JPEG",
        "n01/n01_1.JPEG",
        "n02/n02_1.JPEG",
        "n01/n01_2.JPEG",
    ]
    assert all(os.path.isabs(path) for path in source.paths)
    assert source.label(source.paths[2]) == "n03"
    assert source.bytes == sum(os.path.getsize(path) for path in source.paths)
    assert data.images(3).paths == source.paths[:3]


def test_count_comes_from_the_argument_the_environment_or_the_default(folder, monkeypatch):
    assert data.images().asked == 64
    monkeypatch.setenv("COURSE_IMAGES", "5")
    assert len(data.images()) == 5
    assert len(data.images(2)) == 2


def test_many_cpus_get_two_images_each_unless_a_number_is_given(folder, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 5.0})
    monkeypatch.setenv("COURSE_IMAGES", "3")
    assert data.images().asked == 10
    assert "10 asked for (3 are too few for so many CPUs)" in capsys.readouterr().out
    assert data.images(3).asked == 3
    assert data.enough(64) == 64


def test_a_folder_with_too_few_images_for_the_cpus_says_what_to_do(folder, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for cpus, warned in ((2.0, False), (1000.0, True)):
        monkeypatch.setattr(ray, "cluster_resources", lambda cpus=cpus: {"CPU": cpus})
        data.images()
        assert ("(COURSE_CPUS, at least 2)" in capsys.readouterr().out) == warned
    data.images(3)  # as many as asked for
    assert "COURSE_CPUS" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-3", "many", "6.5"])
def test_an_unusable_count_is_an_error_that_names_the_variable(folder, monkeypatch, value):
    monkeypatch.setenv("COURSE_IMAGES", value)
    with pytest.raises(data.DataError, match=f"COURSE_IMAGES is '{re.escape(value)}'.*1 or more"):
        data.images()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "x"])
def test_an_unusable_argument_is_an_error(folder, value):
    with pytest.raises(data.DataError, match="count is"):
        data.images(value)


def test_a_folder_with_fewer_images_gives_what_it_has_and_says_so(folder, capsys):
    source = data.images(64)
    assert len(source) == 9 and source.asked == 64
    assert capsys.readouterr().out.startswith("Images: 9 of the 64 asked for, folder")


def test_jpg_and_jpeg_in_any_case_count_and_other_files_do_not(folder):
    train = folder / "train"
    for name in ("a.jpg", "b.jpeg", "c.JPG"):
        (train / "n03" / name).write_bytes(jpeg(7))
    for name in ("._n03_0.JPEG", "notes.txt", ".DS_Store"):
        (train / "n03" / name).write_bytes(b"x")
    (train / ".hidden").mkdir()
    (train / "list.JPEG").write_bytes(jpeg(8))
    source = data.images(100)
    assert len(source) == 12 and not source.skipped


def test_a_relative_folder_and_the_home_folder_work(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("IMAGENETTE_DIR", "own")
    assert os.path.isabs(data.images(1).paths[0])
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("IMAGENETTE_DIR", "~/own")
    assert len(data.images(1)) == 1


def spoil(path: str, how: str) -> None:
    whole = Path(path).read_bytes()
    contents = {
        "empty file": b"",
        "truncated": whole[: len(whole) * 2 // 3],
        "not an image": b"<html>Not found</html>" * 50,
    }
    Path(path).write_bytes(contents[how])


@pytest.mark.parametrize("how", ["empty file", "truncated", "not an image"])
def test_an_unreadable_file_is_named_and_replaced(folder, capsys, how):
    before = data.images(4)
    spoil(before.paths[1], how)
    capsys.readouterr()
    source = data.images(4)
    assert source.skipped == [(before.paths[1], how)]
    assert len(source) == 4 and before.paths[1] not in source.paths
    out = capsys.readouterr().out
    assert f"skipped 1 unreadable: train/n02/n02_0.JPEG ({how})" in out
    assert out.count("\n") == 1


def test_unreadable_files_beyond_those_needed_are_not_looked_at(folder):
    last = data.images(9).paths[-1]
    spoil(last, "empty file")
    assert data.images(8).skipped == []
    assert len(data.images(9)) == 8


def test_more_skipped_files_than_fit_on_a_line_are_counted(folder, capsys):
    for path in data.images(9).paths[:7]:
        spoil(path, "empty file")
    source = data.images(9)
    assert len(source.skipped) == 7 and len(source) == 2
    assert "and 2 more" in capsys.readouterr().out


def test_a_vanished_file_a_folder_and_a_damaged_header_are_skipped(folder):
    paths = data.images(9).paths
    os.remove(paths[0])
    os.symlink(folder / "gone", paths[0])
    os.remove(paths[1])
    os.mkdir(paths[1])
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes()[:30])
    source = data.images(9)
    assert [path for path, _ in source.skipped] == paths[:3]
    assert all(reason and str(folder) not in reason for _, reason in source.skipped)


def test_images_with_bytes_after_the_end_and_other_formats_are_readable(folder):
    paths = data.images(3).paths
    with open(paths[0], "ab") as file:
        file.write(b"\0" * 500)
    Image.new("RGB", (20, 20), "red").save(paths[1], "PNG")
    Image.new("CMYK", (20, 20)).save(paths[2], "JPEG")
    assert not data.images(3).skipped


def test_a_folder_without_one_good_image_is_an_error(folder):
    for path in data.images(9).paths:
        spoil(path, "empty file")
    with pytest.raises(data.DataError, match="none of 9 files is a readable image"):
        data.images(4)


@pytest.mark.parametrize(
    ("point_at", "hint"),
    [
        ("own/nowhere", "does not exist"),
        ("own/train/n01/n01_0.JPEG", "is not a folder"),
        ("own/train", "Set it to the folder above: .*own$"),
        ("", "Set it to the folder inside: .*own$"),
        ("own/train/n01", "images without class folders"),
        ("bare", "empty of JPEG files"),
        ("classes", "move them into a folder named train"),
        ("s3://bucket/train", "set COURSE_S3_URI"),
    ],
)
def test_a_wrong_folder_is_an_error_that_says_what_to_do(folder, monkeypatch, point_at, hint):
    (folder.parent / "bare").mkdir()
    shutil.copytree(folder / "train", folder.parent / "classes")
    monkeypatch.setenv(
        "IMAGENETTE_DIR", point_at if "://" in point_at else str(folder.parent / point_at)
    )
    with pytest.raises(data.DataError, match=hint) as error:
        data.images(4)
    assert "IMAGENETTE_DIR is" in str(error.value)


def test_provenance_is_json_without_paths_of_this_machine(folder):
    spoil(data.images(1).paths[0], "empty file")
    source = data.images(4)
    stamp = source.to_dict()
    assert str(folder.parent) not in json.dumps(stamp)
    assert stamp["kind"] == "folder" and stamp["count"] == 4 and stamp["asked"] == 4
    assert stamp["description"] == source.description == "4 images, folder IMAGENETTE_DIR"
    assert stamp["skipped"] == [["train/n01/n01_0.JPEG", "empty file"]]


def test_fingerprint_tells_the_same_images_from_others(folder, monkeypatch):
    four, moved = data.images(4).to_dict(), folder.parent / "moved"
    assert data.images(5).to_dict()["fingerprint"] != four["fingerprint"]
    shutil.copytree(folder, moved)
    monkeypatch.setenv("IMAGENETTE_DIR", str(moved))
    assert data.images(4).to_dict() == four


# --- the bucket and its cache ------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """An S3 server on this machine with ten classes of four images, readable by anyone."""
    boto3 = pytest.importorskip("boto3")
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    for name in (BUCKET, "bare-bucket"):
        client.create_bucket(Bucket=name, ACL="public-read")
    for number in range(40):
        synset = data.SYNSETS[number % 10]
        key = f"imagenette2/train/{synset}/{synset}_{number // 10}.JPEG"
        client.put_object(Bucket=BUCKET, Key=key, Body=jpeg(number), ACL="public-read")
    yield endpoint
    moto.stop()


@pytest.fixture
def s3(server, monkeypatch):
    monkeypatch.setenv("COURSE_S3_URI", URI)
    monkeypatch.setenv("COURSE_S3_ENDPOINT", server)


@pytest.fixture
def requests_made(s3):
    """Each request that the server answers from here on, as "METHOD path"."""
    seen = []

    class Keep(logging.Handler):
        def emit(self, record):
            found = re.search(r"(GET|HEAD|PUT|POST) (\S+) HTTP", record.getMessage())
            if found:
                seen.append(f"{found[1]} {found[2]}")

    logger, handler = logging.getLogger("werkzeug"), Keep()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(before)


def gets(requests: list[str]) -> list[str]:
    return sorted(re.findall(r"GET \S+?/train/(\S+?\.JPEG)", "\n".join(requests)))


def break_off(monkeypatch, after: int):
    """Make the connection fail once `after` more images have come."""
    whole, left = bucket.Bucket._contents, iter(range(after))

    def read(self, files, name):
        if next(left, None) is None:
            raise bucket.Unreachable("failed during the download (connection reset)")
        return whole(self, files, name)

    monkeypatch.setattr(bucket.Bucket, "_contents", read)


def test_bucket_gives_the_images_asked_for_and_fetches_no_others(requests_made, cache, capsys):
    source = data.images(12)
    assert source.kind == "s3" and source.is_real and len(source) == 12
    assert [source.label(path) for path in source.paths] == [*data.SYNSETS, *data.SYNSETS[:2]]
    assert gets(requests_made) == sorted(files_of(source.root, source))
    assert "12 of the 12 asked for, public bucket" in capsys.readouterr().out
    for number, path in enumerate(source.paths):
        assert Path(path).read_bytes() == jpeg(number)
    assert cache in source.root.parents


def test_cache_is_used_without_a_request(requests_made, capsys):
    first = data.images(12)
    requests_made.clear()
    again = data.images(12)
    fewer = data.images(5)
    assert again.kind == fewer.kind == "cache"
    assert again.paths == first.paths and fewer.paths == first.paths[:5]
    assert requests_made == []
    assert "cached copy" in capsys.readouterr().out


def test_only_the_rest_is_fetched_when_more_are_asked_for(requests_made):
    first = data.images(12)
    requests_made.clear()
    more = data.images(30)
    assert more.kind == "s3" and more.paths[:12] == first.paths
    assert gets(requests_made) == sorted(files_of(more.root, more)[12:])
    assert not [request for request in requests_made if "list-type" in request]


def test_a_broken_off_download_leaves_a_cache_that_the_next_run_completes(
    requests_made, monkeypatch, capsys
):
    with monkeypatch.context() as broken:
        break_off(broken, after=7)
        source = data.images(20)
    assert source.kind == "cache" and len(source) == 7
    assert "7 of the 20 asked for" in capsys.readouterr().out
    assert "connection reset" in source.note
    assert all(data.problem(path) is None for path in source.paths)
    requests_made.clear()
    completed = data.images(20)
    assert completed.kind == "s3" and len(completed) == 20 and not completed.note
    assert len(gets(requests_made)) == 13


def test_a_damaged_copy_is_replaced_when_there_is_no_network(s3, deaf, server, monkeypatch):
    with monkeypatch.context() as online:
        online.setenv("COURSE_S3_ENDPOINT", server)
        online.setattr(bucket, "PROBE_SECONDS", 30)
        source = data.images(20)
    spoil(source.paths[4], "truncated")
    again = data.images(10)
    assert again.kind == "cache" and len(again) == 10
    assert again.skipped == [(source.paths[4], "truncated")]


def test_a_gap_in_the_cache_is_filled_so_that_the_order_stays(s3):
    first = data.images(20)
    os.remove(first.paths[3])
    assert data.images(10).paths == first.paths[:10]


def test_a_damaged_copy_is_fetched_again(requests_made):
    source = data.images(40)
    spoil(source.paths[4], "truncated")
    requests_made.clear()
    again = data.images(40)
    assert again.paths == source.paths and not again.skipped
    assert gets(requests_made) == files_of(source.root, source)[4:5]


def test_no_half_written_file_is_left_when_the_disk_is_full(s3, cache, monkeypatch):
    def full(self, contents):
        with open(self, "wb") as file:
            file.write(contents[:10])
        raise OSError(28, "No space left on device")

    data.images(1)  # the listing is there
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(data.DataError, match="No space left.*COURSE_CACHE"):
            data.images(10)
    assert len([path for path in cache.rglob("*") if path.is_file() and "JPEG" in path.name]) == 1


def test_all_of_the_bucket_in_the_cache_is_enough_for_any_count(requests_made):
    assert len(data.images(1000)) == 40
    requests_made.clear()
    again = data.images(1000)
    assert again.kind == "cache" and len(again) == 40 and requests_made == []


def test_an_object_that_is_gone_since_the_listing_is_replaced(s3, cache):
    listed = data.images(1).root / "index.json"
    listing = json.loads(listed.read_text())
    listing[data.SYNSETS[1]].append("a_gone.JPEG")
    listed.write_text(json.dumps(listing))
    source = data.images(10)
    assert len(source) == 10
    assert [(Path(path).name, why) for path, why in source.skipped] == [("a_gone.JPEG", "missing")]


def test_a_spoilt_listing_is_made_again(s3):
    root = data.images(3).root
    (root / "index.json").write_text("[1, 2")
    assert len(data.images(3)) == 3


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://bare-bucket/train", "has no images"),
        ("s3://no-such-bucket/train", "could not be listed|has no images"),
    ],
)
def test_a_bucket_without_the_images_is_announced_and_replaced(s3, monkeypatch, uri, why):
    monkeypatch.setenv("COURSE_S3_URI", uri)
    source = data.images(2)
    assert source.kind == "generated" and re.search(why, source.note)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COURSE_S3_URI", "https://bucket/train"),
        ("COURSE_S3_URI", "s3://bucket/images"),
        ("COURSE_S3_ENDPOINT", "127.0.0.1:5000"),
    ],
)
def test_an_unusable_address_is_an_error(s3, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(data.DataError, match=f"{name} is {value}"):
        data.images(2)


# --- no way to the bucket ----------------------------------------------------------------------


@pytest.fixture
def deaf(monkeypatch):
    """A listener that takes connections and never answers, and the probe made short."""
    monkeypatch.setattr(bucket, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        listener.setblocking(False)
        monkeypatch.setenv("COURSE_S3_URI", URI)
        monkeypatch.setenv("COURSE_S3_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


def connections(listener) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_the_probe_is_short():
    assert bucket.PROBE_SECONDS < 5


def test_a_refused_connection_falls_back_aloud(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("COURSE_S3_URI", URI)
    monkeypatch.setenv("COURSE_S3_ENDPOINT", f"http://127.0.0.1:{port}")
    source = data.images(3)
    assert source.kind == "generated" and not source.is_real
    out = capsys.readouterr().out
    assert "generated sample" in out and "no real photographs: the bucket is out of reach" in out
    assert "refused" in source.to_dict()["note"]


def test_a_server_that_never_answers_falls_back(deaf):
    source = data.images(3)
    assert source.kind == "generated" and "no answer" in source.note


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse instead of dropping")
def test_dropped_packets_fall_back(deaf, monkeypatch):
    with socket.socket() as dropping:
        dropping.bind(("127.0.0.1", 0))
        dropping.listen(0)
        address = dropping.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # a full queue: Linux drops what comes
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        monkeypatch.setenv("COURSE_S3_ENDPOINT", f"http://127.0.0.1:{address[1]}")
        source = data.images(3)
        for client in waiting:
            client.close()
    assert source.kind == "generated" and "no answer" in source.note


def test_a_name_lookup_that_hangs_falls_back(deaf, monkeypatch):
    release = threading.Event()

    def hang(*_, **__):
        release.wait(60)
        raise OSError("released")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        source = data.images(3)
        assert not release.is_set()
    finally:
        release.set()
    assert source.kind == "generated" and "no answer" in source.note


def test_a_failed_probe_is_remembered_for_a_while(deaf, cache):
    data.images(3)
    assert connections(deaf) == 1
    source = data.images(3)
    assert connections(deaf) == 0
    assert "no answer" in source.note and "in the last 10 minutes" in source.note
    long_ago = time.time() - data.PROBE_AGAIN_SECONDS - 1
    os.utime(cache / "bucket-out-of-reach.json", (long_ago, long_ago))
    data.images(3)
    assert connections(deaf) == 1


def test_a_failed_probe_of_one_bucket_says_nothing_of_another(deaf, server, monkeypatch, cache):
    data.images(3)
    monkeypatch.setenv("COURSE_S3_ENDPOINT", server)
    monkeypatch.setattr(bucket, "PROBE_SECONDS", 30)
    assert data.images(3).kind == "s3"
    assert not (cache / "bucket-out-of-reach.json").exists()


def test_without_network_a_partial_cache_is_used_and_says_so(s3, deaf, server, monkeypatch, capsys):
    elsewhere = os.environ["COURSE_S3_ENDPOINT"]
    with monkeypatch.context() as online:
        online.setenv("COURSE_S3_ENDPOINT", server)
        online.setattr(bucket, "PROBE_SECONDS", 30)
        first = data.images(6)
    assert os.environ["COURSE_S3_ENDPOINT"] == elsewhere
    assert data.images(6).kind == "cache" and connections(deaf) == 0
    capsys.readouterr()
    source = data.images(20)
    assert source.kind == "cache" and source.paths == first.paths and source.asked == 20
    out = capsys.readouterr().out
    assert "6 of the 20 asked for, cached copy" in out and "out of reach" in out


def test_a_folder_comes_before_the_cache_and_the_bucket(folder, deaf):
    assert data.images(3).kind == "folder"
    assert connections(deaf) == 0


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(data.DataError, match="set COURSE_CACHE"):
        data.images(3)


# --- the generated sample ----------------------------------------------------------------------


def reference_folder() -> Path | None:
    named = os.environ.get("COURSE_REFERENCE_IMAGES")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "imagenet-fullsize"
    return folder if (folder / "train").is_dir() else None


@pytest.fixture(scope="module")
def sample():
    """The first 128 generated images, as bytes."""
    return [generated.jpeg(number) for number in range(128)]


def test_generated_images_are_announced_cached_and_grow_on_demand(cache, capsys):
    few = data.images(5)
    assert few.kind == "generated" and not few.is_real
    assert "generated sample" in capsys.readouterr().out
    written = {path: os.stat(path).st_mtime_ns for path in few.paths}
    more = data.images(12)
    assert more.paths[:5] == few.paths and len(more) == 12
    assert {path: os.stat(path).st_mtime_ns for path in few.paths} == written
    assert [more.label(path) for path in more.paths] == [*data.SYNSETS, *data.SYNSETS[:2]]
    assert f"generated-{generated.VERSION}" in more.root.name
    assert more.to_dict()["is_real"] is False


def test_generated_folder_has_the_layout_of_a_folder_source(monkeypatch):
    source = data.images(12)
    monkeypatch.setenv("IMAGENETTE_DIR", str(source.root))
    assert data.images(12).paths == source.paths


def test_a_damaged_generated_image_is_made_again():
    source = data.images(3)
    whole = Path(source.paths[1]).read_bytes()
    spoil(source.paths[1], "truncated")
    assert data.images(3).paths == source.paths
    assert Path(source.paths[1]).read_bytes() == whole


def test_generated_bytes_are_the_same_in_another_process_and_order(sample):
    code = "import sys; from helpers import generated as g; sys.stdout.buffer.write(g.jpeg(7))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert run.stdout == sample[7]


def test_long_generation_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 0.0)
    data.images(4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"Images: {done} of 4 generated ..." for done in (1, 2, 3)]
    assert len(lines) == 4


def read(contents: bytes) -> Image.Image:
    return Image.open(io.BytesIO(contents))


@pytest.mark.parametrize("count", [64, 128])
def test_generated_sizes_are_those_of_photographs(sample, count):
    sizes = np.array([len(contents) for contents in sample[:count]])
    recorded = generated.RECORDED
    assert sizes.mean() == pytest.approx(recorded["mean_bytes"], rel=0.05)
    low, high = np.percentile(sizes, [5, 95])
    assert low == pytest.approx(recorded["bytes_5_percent"], rel=0.25)
    assert high == pytest.approx(recorded["bytes_95_percent"], rel=0.15)
    shapes = np.array([read(contents).size for contents in sample[:count]])
    assert tuple(np.median(shapes, axis=0)) == recorded["median_size"]
    assert shapes.prod(axis=1).mean() == pytest.approx(recorded["mean_pixels"], rel=0.15)
    assert (shapes[:, 0] < shapes[:, 1]).mean() > 0.1  # portraits
    assert 1000 <= shapes.max() <= 1200


def test_generated_images_are_of_the_kinds_that_photographs_are(sample):
    modes = [read(contents).mode for contents in sample]
    assert 0.02 < modes.count("L") / len(modes) < 0.07
    color = [read(c) for c, mode in zip(sample, modes, strict=True) if mode == "RGB"]
    full = np.mean([JpegImagePlugin.get_sampling(image) == 0 for image in color])
    assert full == pytest.approx(generated.RECORDED["full_chroma_fraction"], abs=0.1)


def test_generated_images_differ_more_between_classes_than_within(sample):
    small = np.array(
        [
            np.asarray(read(contents).convert("RGB").resize((8, 8)), float).ravel()
            for number, contents in enumerate(sample[:100])
        ]
    )
    between = np.linalg.norm(small[:, None] - small[None, :], axis=-1)
    kind = np.arange(100) % 10
    same = kind[:, None] == kind[None, :]
    apart = ~np.eye(100, dtype=bool)
    assert between[apart].min() > 30  # no two are alike
    assert np.median(between[~same]) > 1.3 * np.median(between[same & apart])


def test_recorded_figures_are_those_of_the_reference_photographs():
    folder = reference_folder()
    if folder is None:
        pytest.skip("no reference photographs (COURSE_REFERENCE_IMAGES)")
    paths = list(folder.glob("train/*/*.JPEG"))
    recorded, sizes = generated.RECORDED, [path.stat().st_size for path in paths]
    assert len(paths) == recorded["images"]
    assert np.mean(sizes) == pytest.approx(recorded["mean_bytes"], rel=0.001)
    low, high = np.percentile(sizes, [5, 95])
    assert (low, high) == pytest.approx(
        (recorded["bytes_5_percent"], recorded["bytes_95_percent"]), rel=0.001
    )
    images = [Image.open(path) for path in paths]
    shapes = np.array([image.size for image in images])
    assert tuple(np.median(shapes, axis=0)) == recorded["median_size"]
    assert shapes.prod(axis=1).mean() == pytest.approx(recorded["mean_pixels"], rel=0.001)
    assert np.mean([image.mode == "L" for image in images]) == recorded["grey_fraction"]
    full = np.mean([getattr(image, "layers", 0) == 3 and is_full(image) for image in images])
    assert full == pytest.approx(recorded["full_chroma_fraction"], abs=0.005)


def is_full(image: Image.Image) -> bool:
    return JpegImagePlugin.get_sampling(image) == 0


def test_generated_images_cost_as_much_to_decode_as_photographs(sample):
    """CPU time of this thread, each image's best of five, the two sets by turns."""
    folder = reference_folder()
    if folder is None:
        pytest.skip("no reference photographs (COURSE_REFERENCE_IMAGES)")
    sets = [[path.read_bytes() for path in sorted(folder.glob("train/*/*.JPEG"))], sample]
    best = [np.full(len(contents), np.inf) for contents in sets]
    for _ in range(5):
        for contents, times in zip(sets, best, strict=True):
            for number, image in enumerate(contents):
                start = time.thread_time()
                read(image).convert("RGB")
                times[number] = min(times[number], time.thread_time() - start)
    assert 0.7 < best[1].mean() / best[0].mean() < 1.3


def test_importing_data_stays_light():
    code = "import sys, helpers.data; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"numpy", "PIL", "pyarrow", "torch", "ray"} & set(run.stdout.split())
