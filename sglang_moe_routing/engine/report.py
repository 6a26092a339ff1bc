"""What start-up checks found. Imports nothing of sglang, so that a report can say it is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """What verification found out about one symbol.

    Attributes:
        problem: empty if all is well.
        diff: from the symbol's signature in a supported release to the installed one.
    """

    target: str
    problem: str
    diff: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        return not self.problem

    def lines(self) -> Iterator[str]:
        """What to show of it: nothing where all is well."""
        if not self.ok:
            yield f"{self.target} {self.problem}"
            yield from (f"  {line}" for line in self.diff)


@dataclass
class Inspection:
    """What the checks found.

    Attributes:
        sglang: installed version, empty if there is none.
        compared_with: the supported release that it was compared with.
        findings: one per hooked or relied-on symbol.
        platform: SGLang platform that a server would run on.
        kernels: implementation of the re-routing on this machine's device.
        kernels_reason: why that one.
        config: the checked file and its policies.
        warnings: what can be served but is hardly meant.
        problems: everything that would keep a server from starting.
    """

    sglang: str = ""
    compared_with: str = ""
    findings: Sequence[Finding] = ()
    platform: str = ""
    kernels: str = ""
    kernels_reason: str = ""
    config: str = ""
    policies: Sequence[str] = ()
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems
