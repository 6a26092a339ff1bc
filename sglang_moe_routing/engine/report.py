"""What start-up checks found. Imports nothing of sglang, so that a report can say it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """What verification found out about one symbol; `problem` is empty if all is well."""

    target: str
    problem: str

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass
class Inspection:
    """What the checks found.

    Attributes:
        sglang: installed version, empty if unusable.
        findings: one per hooked or relied-on symbol.
        platform: SGLang platform that a server would run on.
        kernels: implementation of the re-routing on this machine's device.
        kernels_reason: why that one.
        config: the checked file and its policies.
        warnings: what can be served but is hardly meant.
        problems: everything that would keep a server from starting.
    """

    sglang: str = ""
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
