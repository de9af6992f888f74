"""P: what happens when something fails."""

from collections.abc import Iterator

from helpers.doctor.report import Finding
from helpers.doctor.rules.case import Case, amount, is_model, swallowed


def p1(case: Case) -> Iterator[Finding]:
    for execution in case.executions:
        if execution.errored_blocks:
            yield Finding(
                "P1",
                execution.stages[-1].name if execution.stages else "plan",
                f"{amount(execution.errored_blocks, 'block')} failed and were dropped whole "
                "(`max_errored_blocks`): good rows went with the bad ones",
                "Decode defensively in the function, mark the bad row, and count them",
                {"errored_blocks": execution.errored_blocks},
            )


def p2(case: Case) -> Iterator[Finding]:
    yield from swallowed(case, "P2", is_model)
