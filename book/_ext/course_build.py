"""What this book asks of Sphinx beyond ``_config.yml``.

* Every page is read in every build. Sphinx would skip a notebook whose file is unchanged, but its
  outputs also depend on ``helpers/`` and on the machine.
* The pages in ``read_last`` are read after all others, because they show the others' results.
* When a page fails, the last lines say which page and which cell.
* With ``COURSE_LESSONS_EXECUTED=1`` the lessons keep the outputs that they have (``make test`` has
  just run them); the pages in ``book/`` run all the same.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from myst_nb.core.execute import NotebookClientBase


def keep_executed_lessons(app, config) -> None:
    if os.environ.get("COURSE_LESSONS_EXECUTED") == "1":
        config.nb_execution_excludepatterns = [
            *config.nb_execution_excludepatterns,
            "lessons/*.ipynb",
        ]


def all_pages(app, env, added, changed, removed) -> set[str]:
    return set(env.found_docs)


def order_pages(app, env, docnames: list[str]) -> None:
    last = [name for name in app.config.read_last if name in docnames]
    docnames[:] = [name for name in docnames if name not in last] + last


def describe_failure(error: BaseException, root: Path) -> str | None:
    """The page, the cell and the error, or None when no cell was running."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    clients = [frame.f_locals.get("self") for frame in frames]
    client = next((c for c in clients if isinstance(c, NotebookClientBase)), None)
    if client is None or client.path is None:
        return None
    # The kernel numbers the cells that it starts, so the last numbered cell is the failed one.
    code = [cell for cell in client.notebook.cells if cell.cell_type == "code"]
    started = [cell for cell in code if cell.get("execution_count")]
    page = os.path.relpath(client.path, root)
    if not started:
        return f"{page} failed before its first cell: {error.__cause__ or error}"
    cell = started[-1]
    source = "\n".join(f"    {line}" for line in cell.source.strip().splitlines())
    cause = error.__cause__ or error
    if getattr(cause, "ename", None):
        reason = f"{cause.ename}: {cause.evalue}"
    else:
        reason = f"{type(cause).__name__}: {cause}"
    return (
        f"{page} failed in code cell {code.index(cell) + 1} of {len(code)} "
        f"(In [{cell.execution_count}]):\n\n{source}\n\n{reason}\n"
    )


def report_failure(app, error) -> None:
    report = Path(app.outdir).parent / "failure.txt"
    report.unlink(missing_ok=True)
    message = error and describe_failure(error, Path(app.srcdir))
    if message:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(message, encoding="utf-8")
        print(f"\n{message}", file=sys.stderr)


def setup(app) -> dict:
    app.add_config_value("read_last", [], "env", [list])
    app.connect("config-inited", keep_executed_lessons)
    app.connect("env-get-outdated", all_pages)
    app.connect("env-before-read-docs", order_pages)
    app.connect("build-finished", report_failure)
    return {"parallel_read_safe": False}
