"""The local S3 server: a bucket for Ray Data and pyarrow that counts, waits and goes away."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.s3_server import S3Server


@pytest.fixture(scope="module")
def shared():
    with S3Server(latency_s=0) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.latency_s = 0
    shared.put("bucket/folder/a b+c.txt", b"12345")
    shared.put("bucket/folder/d.txt", b"678")
    shared.take()
    return shared


def test_objects_come_back_and_are_counted(server):
    files = server.filesystem()
    with files.open_input_stream("bucket/folder/a b+c.txt") as file:
        assert file.read() == b"12345"
    with files.open_input_stream("bucket/folder/d.txt") as file:
        assert file.read() == b"678"
    seen = server.take()
    assert (seen["GET"], seen["objects"], seen["bytes_sent"]) == (2, 2, 8)
    assert seen["LIST"] == 0 and seen["PUT"] == 0
    assert server.take() == dict.fromkeys(seen, 0)


def test_a_range_counts_only_its_bytes(server):
    server.put("bucket/long.bin", bytes(100_000))
    with server.filesystem().open_input_file("bucket/long.bin") as file:
        file.seek(90_000)
        assert len(file.read(1000)) == 1000
    seen = server.take()
    assert seen["bytes_sent"] == 1000 and seen["HEAD"] == 1


def test_listings_are_no_gets(server):
    import pyarrow.fs

    found = server.filesystem().get_file_info(pyarrow.fs.FileSelector("bucket/folder"))
    assert sorted(info.base_name for info in found) == ["a b+c.txt", "d.txt"]
    seen = server.take()
    assert seen["LIST"] >= 1 and seen["GET"] == 0 and seen["bytes_sent"] == 0


def test_writing_through_the_filesystem_is_counted(server):
    with server.filesystem().open_output_stream("bucket/new.bin") as file:
        file.write(b"new")
    assert server.take()["PUT"] >= 1
    with server.filesystem().open_input_stream("bucket/new.bin") as file:
        assert file.read() == b"new"


def test_each_request_waits_and_uploads_do_not(server):
    server.latency_s = 0.4
    start = time.perf_counter()
    server.put("bucket/quick.txt", b"1")
    assert time.perf_counter() - start < 0.4
    start = time.perf_counter()
    with server.filesystem().open_input_stream("bucket/quick.txt") as file:
        file.read()
    assert time.perf_counter() - start >= 0.4


def test_requests_wait_side_by_side_and_the_most_at_once_are_counted(server):
    server.latency_s = 0.5
    files = server.filesystem()

    def read(_):
        with files.open_input_stream("bucket/folder/d.txt") as file:
            return file.read()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [b"678"] * 4
    seen = server.take()
    assert seen["GET"] == 4 and seen["objects"] == 1
    assert 2 <= seen["most_at_once"] <= 4


def test_a_missing_object_is_an_error_of_the_reader(server):
    with pytest.raises(FileNotFoundError):
        server.filesystem().open_input_stream("bucket/nowhere.txt").read()


def test_two_servers_do_not_meet(server):
    with S3Server(latency_s=0) as other:
        other.put("bucket/folder/d.txt", b"other")
        assert other.endpoint != server.endpoint
        with other.filesystem().open_input_stream("bucket/folder/d.txt") as file:
            assert file.read() == b"other"
        assert server.take()["GET"] == 0


def test_it_listens_on_this_machine_only(server):
    assert server.endpoint.startswith("http://127.0.0.1:")


def test_a_stopped_server_is_gone_and_says_so():
    server = S3Server(latency_s=0).start()
    process = server._process
    server.stop()
    server.stop()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="call start"):
        server.take()


def test_the_server_ends_with_the_process_that_started_it():
    code = (
        "import os; from helpers.s3_server import S3Server; s = S3Server().start();"
        "print(s._process.pid, flush=True); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its owner")


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
