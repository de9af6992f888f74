"""`python -m helpers <command>`: the course's tools for scripts, jobs and clusters.

A command is one entry of `_COMMANDS`: its module has `add_arguments(parser)` and
`main(options) -> exit code`; `split_arguments(list)`, where there is one, sees the words first.
"""

import argparse
import importlib
import sys

# name -> module, one line for the list of commands, and what its own --help says
_COMMANDS = {
    "compare": (
        "helpers.report",
        "run the baseline and the optimized pipeline, a plain loop, and this machine's ceiling",
        """\
Runs the same images through the baseline, the optimized pipeline, a plain PyTorch DataLoader loop
and, where it is installed, Daft, each in a process of its own; measures the ceiling of this
machine; checks that all answers are the same; and writes a report with figures. (Loop and Daft run
as they come. Tuned like the optimized pipeline, the loop stands in lesson 06.)

  python -m helpers compare --images 512
  python -m helpers compare --images 512 --json numbers.json

JSON: images (where they come from, count); baseline, optimized: seconds, images_per_s (after Ray is
ready), end_to_end_s, end_to_end_images_per_s (from the start of the process), ray_ready_s,
first_answers_s (from Ray ready), steady_images_per_s (after the first answers),
object_store_peak_bytes, spilled_bytes, worker_peak_bytes, cpu_percent, cpu_seconds (of actors,
tasks, driver and ray), gpu_percent, bytes_read, bytes_written, files_written, model_constructions,
executions, stages and more; dataloader, daft (null: not installed): seconds, images_per_s (from the
start of the process), first_answers_s, steady_images_per_s; ceiling: read, decode, model (images/s
of each repeat), together; agreement of the optimized answers with each other one and with the
reference: images, same, tolerance, largest_difference, top1_same, clear (images whose first class
leads by more than the tolerance), clear_top1_same; ratios: images_per_s and object_store_saved
(against the baseline), steady_vs_ceiling, steady_vs_dataloader, end_to_end_vs_dataloader,
first_answers_s; provenance""",
    ),
    "baseline": (
        "helpers.commands",
        "classify images with the baseline, mistakes and all",
        """\
Classifies images with helpers/baseline.py, as a newcomer might write it. Slow on purpose.

  python -m helpers baseline --images 64 --output answers""",
    ),
    "optimized": (
        "helpers.commands",
        "classify images with the optimized pipeline; run it again to resume",
        """\
Classifies images with helpers/optimized.py and writes Parquet files with path, label, logits and
error of each image. Images whose answers are in the output already are not done again, so after a
crash run the same command again.

  python -m helpers optimized --images 512 --output answers
  python -m helpers optimized --input photos/ --output answers
  python -m helpers optimized --input s3://bucket/photos --output s3://bucket/answers""",
    ),
    "ceiling": (
        "helpers.commands",
        "measure what this machine could do: read, decode and model alone",
        """\
Reads, decodes and classifies some images, each part alone, with one process for each core and
without Ray. What all parts together would allow is the ceiling of any pipeline here.""",
    ),
    "data": (
        "helpers.commands",
        "fetch or generate the images, and say where they are",
        """\
Finds the images as every lesson does: IMAGENETTE_DIR, else the cached copy, else the public bucket,
else a generated sample.""",
    ),
    "doctor": (
        "helpers.doctor.command",
        "run a script of yours and name the mistakes in its Ray Data pipeline",
        """\
Runs your script unchanged, in this process, and reads each Ray Data execution: its plan, the
statistics of its operators, and the functions that you handed to it. At the end it names the
mistakes that it found: id, operator, evidence, what to change, lesson. It needs no GPU.

  python -m helpers doctor my_script.py --my-option 3
  python -m helpers doctor --json my_script.py              JSON as the last line of the output
  python -m helpers doctor --json findings.json my_script.py

exit code: 0 no finding, 1 findings, 2 the script could not run (its own traceback is shown, and
what was found until then)

JSON: version, script, failure (empty, or why the script did not end well), executions, notes,
cannot_see (id: reason), findings: a list of id, title, operator, evidence, numbers, change, lesson,
seen ("plan", "statistics" or "code")""",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m helpers", description="Pipelines and tools of the course."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary, text) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if arguments[:1] == [name]:  # the others are not imported
            importlib.import_module(module).add_arguments(command)
    if arguments[:1] and arguments[0] in _COMMANDS:
        module = importlib.import_module(_COMMANDS[arguments[0]][0])
        split = getattr(module, "split_arguments", list)
        options = parser.parse_args([arguments[0], *split(arguments[1:])])
        return module.main(options)
    parser.parse_args(arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main())
