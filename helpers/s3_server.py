"""A small S3 server on this machine that counts what is asked of it and waits before it answers.

For lessons: a bucket is far away and every request to it is paid for, and neither shows on the
disk of a laptop. The protocol is the real one, so Ray Data reads from it as from any bucket. The
server is moto's, in a process of its own, and listens on this machine only.

    with S3Server(latency_s=0.05) as server:
        server.put("photos/train/a.jpeg", b"...")
        ray.data.read_binary_files("photos/train", filesystem=server.filesystem())
        server.take()  # {"GET": 1, "LIST": 1, "bytes_sent": 3, ...}
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from urllib.parse import parse_qs, quote

_CONTROL = "/_course/"  # not a name that a bucket can have
_START_SECONDS = 60.0


class S3Server:
    """One server with its buckets, which are gone when it stops.

    latency_s: how long each request waits before its answer begins; requests wait side by side, as
    they do in front of a bucket. Uploads with `put` do not wait.
    """

    def __init__(self, latency_s: float = 0.05):
        self._latency_s = latency_s
        self._process: subprocess.Popen | None = None
        self._buckets: set[str] = set()
        self._port = 0

    def start(self) -> S3Server:
        """Start the process and wait until it answers. Raises RuntimeError when it does not."""
        if self._process is not None:
            return self
        # The server ends when its standard input does, so it never outlives its notebook.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.s3_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        timer = threading.Timer(_START_SECONDS, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line.strip().isdigit():
            self.stop()
            raise RuntimeError("the local S3 server did not start; is moto[server,s3] installed?")
        self._port = int(line)
        self.latency_s = self._latency_s
        return self

    def stop(self) -> None:
        """End the process. Safe to call twice."""
        process, self._process = self._process, None
        self._buckets.clear()
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def latency_s(self) -> float:
        """Seconds that each request waits; may be changed at any time."""
        return self._latency_s

    @latency_s.setter
    def latency_s(self, seconds: float) -> None:
        if self._process is not None:
            self._request("POST", f"{_CONTROL}latency", json.dumps(seconds).encode())
        self._latency_s = seconds

    def put(self, path: str, content: bytes) -> None:
        """Store an object at "bucket/key"; the bucket is made if need be."""
        bucket = path.partition("/")[0]
        if bucket not in self._buckets:
            self._request("PUT", f"/{bucket}", headers={"x-amz-acl": "public-read"})
            self._buckets.add(bucket)
        self._request("PUT", f"/{quote(path)}", content)

    def filesystem(self):
        """A `pyarrow.fs.S3FileSystem` for this server, as Ray Data's readers take it."""
        import pyarrow.fs

        return pyarrow.fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self._port}",
            scheme="http",
            region="us-east-1",
            access_key="course",
            secret_key="course",
        )

    def take(self) -> dict[str, int]:
        """What was asked since the last call, and forget it.

        "GET" (objects or parts of them), "LIST", "HEAD", "PUT": requests of each kind;
        "objects": different ones that were got; "bytes_sent": bytes of objects, without listings;
        "most_at_once": most GET requests waiting or being answered at the same moment.
        """
        return json.loads(self._request("POST", f"{_CONTROL}take"))

    def _request(self, method: str, path: str, body: bytes = b"", headers=None) -> bytes:
        if self._process is None:
            raise RuntimeError("the server does not run; call start()")
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            no_wait = {"x-course-no-wait": "1"} | (headers or {})
            connection.request(method, path, body, no_wait)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: the server answered {answer.status}")
        return content


# ---- in the server's process --------------------------------------------------------------------


class _Counting:
    """The web application around moto's: waits, counts, and answers the control requests."""

    def __init__(self, application):
        self._application = application
        self._lock = threading.Lock()
        self._latency_s = 0.0
        self._at_once = 0
        self._forget()

    def _forget(self) -> None:
        self._counts: Counter = Counter()
        self._objects: set[str] = set()
        self._most_at_once = self._at_once

    def __call__(self, environ, start_response) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(_CONTROL):
            return self._control(path, environ, start_response)
        if "HTTP_X_COURSE_NO_WAIT" in environ:
            return self._application(environ, start_response)
        return self._answer(_kind(environ), path, environ, start_response)

    def _answer(self, kind, path, environ, start_response) -> Iterable[bytes]:
        got = kind == "GET"
        with self._lock:
            self._counts[kind] += 1
            self._at_once += got
            self._most_at_once = max(self._most_at_once, self._at_once)
        try:
            time.sleep(self._latency_s)
            chunks = [bytes(chunk) for chunk in self._application(environ, start_response)]
        finally:
            with self._lock:
                self._at_once -= got
        if got:
            with self._lock:
                self._objects.add(path)
                self._counts["bytes_sent"] += sum(map(len, chunks))
        return chunks

    def _control(self, path, environ, start_response) -> Iterable[bytes]:
        answer = b""
        with self._lock:
            if path.endswith("take"):
                kinds = ("GET", "LIST", "HEAD", "PUT", "bytes_sent")
                counts = {kind: self._counts[kind] for kind in kinds}
                counts["objects"] = len(self._objects)
                counts["most_at_once"] = self._most_at_once
                answer = json.dumps(counts).encode()
                self._forget()
            else:
                size = int(environ.get("CONTENT_LENGTH") or 0)
                self._latency_s = float(json.loads(environ["wsgi.input"].read(size)))
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]


def _kind(environ) -> str:
    """GET of an object, LIST of a bucket, or another method's name."""
    method = environ["REQUEST_METHOD"]
    in_bucket = "/" in environ["PATH_INFO"].strip("/")
    listing = not in_bucket or "list-type" in parse_qs(environ.get("QUERY_STRING", ""))
    return "LIST" if method == "GET" and listing else method


def _serve() -> None:
    """Print the port and answer until standard input ends."""
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args) -> None:
            pass

    application = _Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
