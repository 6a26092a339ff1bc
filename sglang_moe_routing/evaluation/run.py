"""One evaluation from start to end: every policy in every setting, kept as it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import VANILLA
from ..text import TokenizedText
from .measure import Evaluation, Measured, Setting, batches, figures, rounding
from .pairs import Pair, compare

SECTIONS = ("policies", "same_domain", "mixed_policies")
"""Sections of the result: batches of mixed sources; of one source each; of mixed sources with a
share of vanilla sequences."""


@dataclass(frozen=True)
class Case:
    """One cell of the result."""

    section: str
    policy: str
    setting: Setting


@dataclass
class Result:
    """What has been measured so far; written to `file` after every cell.

    Attributes:
        header: what the result holds besides figures: model, settings, machine, command.
        pairs: what to compare in every section that holds both.
        figures: section -> policy -> batch size -> figures.
        compared: one flat object per pair, section and batch size.
    """

    file: Path
    header: Mapping[str, Any]
    pairs: Sequence[Pair] = ()
    figures: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)
    vanilla_rounding: Mapping[str, float] | None = None
    complete: bool = False

    def add(self, case: Case, found: Mapping[str, Any]) -> None:
        policies = self.figures.setdefault(case.section, {})
        policies.setdefault(case.policy, {})[str(case.setting.batch_size)] = dict(found)
        self.compared += self._compare(case)
        self.write()

    def _compare(self, case: Case) -> Iterator[dict[str, Any]]:
        """The pairs that the figures of `case` complete."""
        size = case.setting.batch_size
        cells = {name: found.get(str(size)) for name, found in self.figures[case.section].items()}
        for pair in self.pairs:
            first, second = (cells.get(name) for name in pair)
            if case.policy in pair and first and second:
                place = {"section": case.section, **pair._asdict(), "batch_size": size}
                yield {**place, **compare(first, second)}

    def write(self) -> None:
        self.file.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "policies": self.figures.get("policies", {}),
            **{name: self.figures[name] for name in SECTIONS[1:] if name in self.figures},
            **({"pairs": self.compared} if self.pairs else {}),
            "vanilla_rounding": self.vanilla_rounding,
            **self.header,
        }


def cases(
    policies: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    same_domain: bool = False,
    vanilla_share: float = 0.0,
) -> Iterator[Case]:
    """Every cell, those of vanilla first. A batch of one sequence cannot mix policies."""
    others = [name for name in policies if name != VANILLA]
    for batch_size in batch_sizes:
        settings = {"policies": Setting(batch_size)}
        if same_domain:
            settings["same_domain"] = Setting(batch_size, grouping="same")
        for section, setting in settings.items():
            for name in (VANILLA, *others):
                yield Case(section, name, setting)
        if vanilla_share and batch_size > 1:
            for name in others:
                setting = Setting(batch_size, vanilla_share=vanilla_share)
                yield Case("mixed_policies", name, setting)


def check_cases(text: TokenizedText, seed: int, wanted: Sequence[Case]) -> None:
    """Raise `BenchError` if the text does not make the batches of a case."""
    for case in wanted:
        batches(text, case.setting, seed)


def run(
    evaluation: Evaluation,
    wanted: Sequence[Case],
    result: Result,
    on_case: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure every case into `result`, which stays marked as partial until all are there."""
    vanilla: list[Measured] = []
    for number, case in enumerate(wanted, start=1):
        on_case(
            f"{number} of {len(wanted)}: {case.policy}, batches of {case.setting.batch_size}"
            + (f" ({case.section.replace('_', ' ')})" if case.section != "policies" else "")
        )
        base = evaluation.vanilla(case.setting)
        if case.policy == VANILLA:
            vanilla.append(base)
            result.vanilla_rounding = rounding(vanilla)
            result.add(case, figures(base, base))
        else:
            result.add(case, figures(evaluation.measure(case.policy, case.setting), base))
    result.complete = True
    result.write()
