"""What a verification found: one row a check."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["passed", "failed", "not applicable"]


class NotApplicable(Exception):
    """Why a check says nothing about this training."""


class Failed(Exception):
    """Why a check failed."""


@dataclass(frozen=True)
class Verdict:
    """The row of one check."""

    check: str
    """loop, resume, manual, ddp or kill."""
    outcome: Outcome
    text: str
    """How much was compared, or where and probably why it failed, or why the check says nothing."""

    def __str__(self) -> str:
        return f"{self.check:7} {self.outcome:14}  {self.text}"


@dataclass
class Report:
    """The rows of a verification; ``print(report)`` shows them."""

    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(verdict.outcome != "failed" for verdict in self.verdicts)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __getitem__(self, check: str) -> Verdict:
        return {verdict.check: verdict for verdict in self.verdicts}[check]

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts))
