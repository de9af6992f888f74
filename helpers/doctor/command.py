"""The doctor on the command line: `python -m helpers doctor my_script.py [its arguments]`."""

import json
import sys
import traceback
from pathlib import Path

from helpers.doctor.observe import Stuck, watch


def add_arguments(parser) -> None:
    """The arguments of `python -m helpers doctor`."""
    parser.add_argument("script", help="the Python script to run and observe")
    parser.add_argument(
        "arguments", nargs="...", metavar="...", help="arguments for the script; put -- before "
        "them when one of them is --json",
    )  # fmt: skip
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="findings as JSON: into FILE, or (--json alone) as the last line of the output",
    )


def split_arguments(arguments: list[str]) -> list[str]:
    """Let `--json` stand before or behind the script, with or without a file."""
    own, rest = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, rest = arguments[:at], arguments[at + 1 :]
    found, others, i = [], [], 0
    while i < len(own):
        if own[i] == "--json":
            following = own[i + 1] if i + 1 < len(own) else ""
            if following.endswith(".json"):
                i += 1
            found = [f"--json={following if following.endswith('.json') else '-'}"]
        elif own[i].startswith("--json="):
            found = [own[i]]
        else:
            others.append(own[i])
        i += 1
    return [*found, *others, *rest]


def main(options) -> int:
    """Run the script under observation. 0: no finding, 1: findings, 2: it could not run."""
    script = Path(options.script)
    if not script.is_file():
        print(f"doctor: there is no file {options.script}", file=sys.stderr)
        return 2
    try:
        source = compile(script.read_bytes(), str(script.resolve()), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        traceback.print_exception(type(error), error, None)
        print(f"doctor: {options.script} is not valid Python", file=sys.stderr)
        return 2
    import ray

    ours, before = sys.modules["__main__"], ray.is_initialized()
    try:
        with watch() as seen:
            failure = _run_script(source, script.resolve(), options.arguments, seen)
            diagnosis = seen.diagnosis()
    finally:
        sys.modules["__main__"] = ours  # until now the script's functions were looked up there
    if ray.is_initialized() and not before:
        ray.shutdown()  # its last messages come before the findings
    sys.stdout.flush()
    if failure:
        print(f"doctor: {options.script} {failure}", file=sys.stderr)
    elif not seen.executions:
        diagnosis.notes.append("The script ran no Ray Data pipeline.")
    result = diagnosis.to_dict() | {"script": str(script), "failure": failure}
    if options.json is None:
        print(f"\n{diagnosis}" if not failure or diagnosis else "", flush=True)
    elif options.json == "-":
        print(json.dumps(result, default=float), flush=True)
    else:
        Path(options.json).write_text(json.dumps(result, indent=2, default=float) + "\n")
        print(f"\n{diagnosis}\n\nWritten to {options.json}", flush=True)
    return 2 if failure else 1 if diagnosis.findings else 0


def _run_script(source, script: Path, arguments: list[str], seen: watch) -> str:
    """Execute a script as `python script` would; returns why it did not end well, or nothing."""
    import types

    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=str(script), __builtins__=__builtins__)
    saved = sys.argv, sys.path[:]
    sys.modules["__main__"], sys.argv = module, [str(script), *arguments]
    sys.path[0:1] = [str(script.parent)]
    try:
        exec(source, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            return f"ended with sys.exit({end.code!r})"
    except Stuck as stuck:
        print(f"doctor: {stuck}", file=sys.stderr)
    except KeyboardInterrupt:
        if not seen.blocked:
            return "was interrupted"
        print(f"doctor: {seen.blocked} The doctor ended this execution.", file=sys.stderr)
    except BaseException as error:
        if _caused_by_stuck(error):
            print(f"doctor: {_caused_by_stuck(error)}", file=sys.stderr)
            return ""
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next  # the script's own traceback, without the doctor's lines
        traceback.print_exception(type(error), error, frames)
        return f"raised {type(error).__name__}"
    finally:
        sys.argv, sys.path[:] = saved
    return ""


def _caused_by_stuck(error) -> str:
    while error is not None:
        if isinstance(error, Stuck):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""
