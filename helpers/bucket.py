"""The public bucket with Imagenette, read anonymously and never waited for long.

Knows the network and nothing of the disk: `helpers.data` decides what to fetch and keeps it.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

URI = "s3://anonymous@air-example-data-2/imagenette2/train/"

PROBE_SECONDS = 3.0  # a bucket that has not answered by then counts as out of reach
REQUEST_SECONDS = 15.0  # for one listing or one image, once the bucket has answered
THREADS = 16


class Unreachable(Exception):
    """The bucket cannot be used; the message completes "the bucket ..."."""


@dataclass(frozen=True)
class Bucket:
    """The bucket `name`, where `prefix` (without slashes around it) holds the class folders.

    `endpoint` is the URL of another S3 server than Amazon's, or None.
    """

    name: str
    prefix: str
    endpoint: str | None = None

    @classmethod
    def configured(cls) -> Bucket | None:
        """The bucket that the environment asks for, or None if it is `off`.

        Raises ValueError for an address that is none.
        """
        uri = os.environ.get("COURSE_S3_URI") or URI
        if uri.lower() == "off":
            return None
        parts = urlsplit(uri)
        name, prefix = parts.netloc.rpartition("@")[2], parts.path.strip("/")
        if parts.scheme != "s3" or not name or prefix.rpartition("/")[2] != "train":
            raise ValueError(f"COURSE_S3_URI is {uri}; write it as s3://bucket/path/train/ or off.")
        endpoint = os.environ.get("COURSE_S3_ENDPOINT") or None
        if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
            raise ValueError(f"COURSE_S3_ENDPOINT is {endpoint}; write it as http://host:port.")
        return cls(name, prefix, endpoint)

    def connect(self) -> None:
        """Find out whether the bucket answers; raises Unreachable within seconds if not."""
        _ = self._files

    @cached_property
    def _files(self):
        region = self._region()  # before the import: without an answer it is not needed
        import pyarrow.fs

        scheme, _, host = (self.endpoint or "https://").partition("://")
        return pyarrow.fs.S3FileSystem(
            anonymous=True,
            region=region,
            scheme=scheme,
            endpoint_override=host.rstrip("/") or None,
            connect_timeout=PROBE_SECONDS,
            request_timeout=REQUEST_SECONDS,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=2),
        )

    def _region(self) -> str:
        # Looking up a name, or connecting through a firewall that drops packets, can hang far
        # beyond any timeout set: hence a thread, which is left behind.
        answer: list[tuple[str, str]] = []
        thread = threading.Thread(target=self._ask, args=(answer,), daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS)
        region, error = answer[0] if answer else ("", f"no answer in {PROBE_SECONDS:.0f} s")
        if error:
            raise Unreachable(f"is out of reach ({error})")
        return region

    def _ask(self, answer: list[tuple[str, str]]) -> None:
        """Put (region, "") or ("", error) in `answer`; whatever the server answers will do."""
        region, error = "us-west-2", ""
        url = urlsplit(self.endpoint or "https://s3.amazonaws.com")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            connection = kinds[url.scheme](url.netloc, timeout=2 * PROBE_SECONDS)
            connection.request("HEAD", f"/{self.name}")
            region = connection.getresponse().getheader("x-amz-bucket-region") or region
            connection.close()
        except ssl.SSLCertVerificationError:
            pass  # something is there; pyarrow brings certificates of its own
        except Exception as why:  # no such name, refused, timeout, nonsense: all mean the same
            error = _short(why)
        answer.append((region, error))

    def listing(self, folders: Iterable[str]) -> dict[str, list[str]]:
        """The file names in each class folder.

        One listing for each, side by side: they are short, where all of a bucket may be long.
        Raises Unreachable.
        """
        files = self._files
        import pyarrow.fs

        def names(folder: str) -> list[str]:
            path = f"{self.name}/{self.prefix}/{folder}"
            found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
            return [info.base_name for info in found if info.is_file]

        folders = list(folders)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return dict(zip(folders, pool.map(names, folders), strict=True))
        except OSError as error:
            raise Unreachable(f"could not be listed ({_short(error)})") from error

    def read(self, names: Iterable[str], keep: Callable[[str, bytes], None]) -> Iterator[str]:
        """Fetch files named `<class>/<file>`, side by side, and yield the name of each when done.

        `keep(name, contents)` is called in several threads, as soon as a file is here: nothing
        that has arrived is lost when another file fails. It is not called for a file that is
        gone. Raises Unreachable.
        """
        files = self._files

        def fetch(name: str) -> str:
            contents = self._contents(files, name)
            if contents is not None:
                keep(name, contents)
            return name

        pool = ThreadPoolExecutor(THREADS)
        try:
            for done in as_completed([pool.submit(fetch, name) for name in names]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt, fetch no more

    def _contents(self, files, name: str) -> bytes | None:
        try:
            with files.open_input_file(f"{self.name}/{self.prefix}/{name}") as file:
                size, contents = file.size(), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unreachable(f"failed during the download ({_short(error)})") from error
        if len(contents) != size:
            raise Unreachable("failed during the download (a short answer)")
        return contents


def _short(error: BaseException) -> str:
    """An error in a few words, to stand on one line with others."""
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 100 else f"{type(error).__name__}: {text[:100]}..."
