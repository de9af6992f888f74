"""What belongs to one run of a notebook, and how to take it out: outputs, counts, timings.

A hook and a command line tool; needs no package.

    python tests/notebooks.py lessons/*.ipynb           # names what is dirty, exit status 1
    python tests/notebooks.py --strip lessons/*.ipynb   # cleans in place, exit status 1 if it did
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def strip(notebook: dict) -> list[str]:
    """Clean `notebook` in place and return what was taken out, one line for each finding."""
    found = []
    for number, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] == "code":
            for key, clean in (("outputs", []), ("execution_count", None)):
                if cell.get(key) != clean:
                    found.append(f"cell {number}: {key}")
                    cell[key] = clean
        # Jupyter keeps the times of the last run here.
        if cell["metadata"].pop("execution", None) is not None:
            found.append(f"cell {number}: execution times")
    if notebook["metadata"].pop("widgets", None) is not None:
        found.append("notebook: widget state")
    if notebook["metadata"].get("kernelspec", {}).get("name") != KERNEL["name"]:
        found.append("notebook: the kernel is not python3")
        notebook["metadata"]["kernelspec"] = dict(KERNEL)
    if notebook["metadata"].get("language_info") != {"name": "python"}:
        found.append("notebook: version of Python in language_info")
        notebook["metadata"]["language_info"] = {"name": "python"}
    return found


def main(arguments: list[str]) -> int:
    in_place = "--strip" in arguments
    dirty = False
    for name in arguments:
        if name.startswith("-"):
            continue
        path = Path(name)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        found = strip(notebook)
        dirty = dirty or bool(found)
        for line in found:
            print(f"{path}: {line}")
        if found and in_place:
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
    return int(dirty)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
