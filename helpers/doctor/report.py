"""What the doctor reports: findings, shown in a notebook, in a terminal and as JSON."""

from dataclasses import dataclass, field

from helpers import plots
from helpers.catalog import FAMILIES, MISTAKES

_LESSONS = {
    "I": "02_ingestion",
    "T": "03_transformation",
    "R": "04_resources",
    "O": "05_output",
    "P": "07_production",
}


@dataclass(frozen=True)
class Finding:
    """One mistake, with what proves it."""

    id: str
    operator: str
    evidence: str
    change: str
    numbers: dict = field(default_factory=dict)
    seen: str = "statistics"  # "plan", "statistics" or "code": where the evidence comes from

    @property
    def title(self) -> str:
        from helpers.doctor.rules import RULES

        return MISTAKES[self.id].title if self.id in MISTAKES else RULES[self.id].title

    @property
    def lesson(self) -> str:
        if self.id in MISTAKES:
            return MISTAKES[self.id].lesson
        return _LESSONS.get(self.id[:1], next(iter(FAMILIES.values())))

    def to_dict(self) -> dict:
        return {
            "id": self.id,
            "title": self.title,
            "operator": self.operator,
            "evidence": self.evidence,
            "numbers": self.numbers,
            "change": self.change,
            "lesson": self.lesson,
            "seen": self.seen,
        }


@dataclass
class Diagnosis:
    """All findings of one pipeline or script; shows itself in a notebook and in a terminal."""

    findings: list[Finding]
    executions: int
    not_run: bool = False  # only the plan was read
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def ids(self) -> list[str]:
        return sorted({f.id for f in self.findings})

    def __bool__(self) -> bool:
        return bool(self.findings)

    def to_dict(self) -> dict:
        from helpers.doctor.rules import CANNOT_SEE

        return {
            "version": 1,
            "executions": self.executions,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": self.notes,
            "cannot_see": CANNOT_SEE,
        }

    def _headline(self) -> str:
        looked = (
            "the plan only, nothing ran" if self.not_run else _plural(self.executions, "execution")
        )
        if self.healthy:
            return f"No mistake found ({looked})."
        return f"{_plural(len(self.findings), 'finding')} ({looked})."

    def _blind(self) -> str:
        from helpers.doctor.rules import CANNOT_SEE

        return "Not visible from plan, statistics and code: " + ", ".join(CANNOT_SEE) + "."

    def __str__(self) -> str:
        lines = [f"Doctor: {self._headline()}"]
        for f in self.findings:
            lines += [
                "",
                f"{f.id}  {f.title}",
                f"    operator  {f.operator}",
                f"    evidence  {f.evidence}",
                f"    change    {f.change}",
                f"    lesson    {f.lesson}",
            ]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join([*lines, "", self._blind()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        kind = "ok" if self.healthy else "wrong"
        panel = plots.panel(kind, self._headline(), [*self.notes, self._blind()])
        if self.healthy:
            return panel
        rows = [
            [f"{f.id} · {f.title}", f"`{f.operator}`: {f.evidence}", f.change, f.lesson]
            for f in self.findings
        ]
        header = ["mistake", "evidence", "change", "lesson"]
        return panel + plots.Table(header, rows)._repr_html_()


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
