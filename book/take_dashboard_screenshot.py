"""Take book/dashboard.png: the Ray dashboard's page of a job, while a Ray Data pipeline runs.

    python book/take_dashboard_screenshot.py [--images 200] [--output book/dashboard.png]

It starts Ray with its dashboard, runs lesson 01's pipeline, opens the page of this job in a
headless Chromium, waits until some images are done, and takes the picture. Run it again when Ray's
dashboard looks different after an upgrade, and bring the text below the picture in lesson 01 up to
date.

Needs what the tests need: `pip install -r tests/requirements.txt`, and a Chromium or Chrome
(COURSE_CHROMIUM names one; else the first on the PATH is taken).
"""

import argparse
import io
import os
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from helpers import data, device, measure, model

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",  # in containers, where there is nobody but root
    "--disable-gpu",
    # The rest keeps the browser from asking the network for anything of its own.
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH = 1400  # pixels
LARGEST = 400_000  # bytes
TIMEOUT_MS = 60_000


def browser_path() -> str:
    """The browser to use. Exits with a message when there is none."""
    names = (os.environ.get("COURSE_CHROMIUM"), *map(shutil.which, BROWSERS))
    path = next((name for name in names if name), None)
    if path is None:
        sys.exit("No Chromium found. Install one, or name it: COURSE_CHROMIUM=<path>")
    return path


def pipeline(paths: list[str], settings: device.Settings):
    """Lesson 01's pipeline. Returns a Dataset of `path` and `logits`."""
    import ray
    from ray.data import ActorPoolStrategy

    def crop(row):
        return {"path": row["path"], "image": model.preprocess(row["bytes"])}

    class Classify:
        def __init__(self):
            self.net = model.resnet50(settings.precision, settings.channels_last)
            self.net.to(settings.torch_device)

        def __call__(self, batch):
            return {"path": batch["path"], "logits": model.predict(self.net, batch["image"])}

    rows = ray.data.read_binary_files(paths, include_paths=True).map(crop)
    return rows.map_batches(
        Classify,
        batch_size=settings.batch_size,
        compute=ActorPoolStrategy(size=settings.actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )


def take(url: str, some_done: threading.Event) -> Image.Image:
    """The upper part of the job's page, with the operators listed, after `some_done`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url)
        page.get_by_text("Ray Data Overview").first.click()  # unfolds the section
        dataset = page.locator("tr", has_text="dataset_").first
        dataset.wait_for()
        some_done.wait(TIMEOUT_MS / 1000)
        dataset.locator("svg").first.click()  # the arrow that unfolds the operators
        page.locator("tr", has_text="MapBatches").first.wait_for()
        page.wait_for_timeout(5000)  # the page asks for news every few seconds
        bottom = page.get_by_text("Ray Core Overview").first.bounding_box()["y"]
        picture = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": bottom - 20})
        browser.close()
    return Image.open(io.BytesIO(picture))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--images", type=int, default=200, help="how many, so how long it runs")
    arguments.add_argument("--output", type=Path, default=HERE / "dashboard.png")
    options = arguments.parse_args()

    device.start_ray(dashboard=True)
    import ray

    dashboard = ray.init(ignore_reinit_error=True).dashboard_url
    job = ray.get_runtime_context().get_job_id()
    images = data.images(options.images)
    settings = device.recommend()
    some_done = threading.Event()

    def watch(sample):
        if sample.rows >= len(images) / 4:
            some_done.set()

    def work():
        measure.run(lambda: pipeline(images.paths, settings), on_sample=watch)
        some_done.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        picture = take(f"http://{dashboard}/#/jobs/{job}", some_done)
    finally:
        worker.join()
    small = picture.quantize(128)  # flat colors: a third of the bytes, and nobody sees it
    small.save(options.output, optimize=True)
    size = options.output.stat().st_size
    if size > LARGEST:
        sys.exit(f"{options.output} has {size:,} bytes; the limit is {LARGEST:,}.")


if __name__ == "__main__":
    main()
