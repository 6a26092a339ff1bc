"""Search the policy with the fewest active experts within a bound on cross-entropy.

Every family of policies has one number that trades T for quality, and both are monotone in it, so
its smallest value within the bound is found by bisection, for each batch size by itself. A family
is left once it cannot beat the best T found at a batch size. The text is split: one half decides,
the other confirms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BenchError
from ..text import TokenizedText
from .measure import Evaluation, Interval, Measured, Setting, increase

BUDGET_STEPS = 32
"""Budgets are tried in steps of a 32nd of the experts."""

MAPPED_SHARE = 0.3
LOWEST_SIMILARITY = -1e9
"""A threshold that every similarity reaches: the primaries alone decide T."""

Definition = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Policies that differ in one number, and what they have in common.

    Attributes:
        knob: the number's key; the larger, the safer and the slower.
        values: what it may be, rising.
        rest: the other keys of the definition.
    """

    name: str
    knob: str
    values: Sequence[int]
    rest: Mapping[str, Any]

    def policy(self, value: int) -> str:
        """Name of the candidate with this value."""
        return f"{self.name}-{value}"

    def definition(self, value: object) -> Definition:
        return {**self.rest, self.knob: value}


@dataclass(frozen=True)
class Trial:
    """One candidate, measured on one half of the text.

    Attributes:
        delta: cross-entropy over vanilla, nats per token.
        limit: what the bound allows there.
        error: standard error of `delta`.
    """

    family: str
    value: int
    batch_size: int
    cross_entropy: float
    delta: Interval
    error: float
    limit: float
    active: float
    active_base: float

    @property
    def is_safe(self) -> bool:
        """Whether the bound is kept with one standard error to spare."""
        return self.delta.mean + self.error <= self.limit

    @property
    def is_within(self) -> bool:
        return self.delta.mean <= self.limit

    def helps(self, batch_size: int) -> bool:
        return self.batch_size == batch_size and self.is_safe


@dataclass
class Tuning:
    """What was tried, and what came of it.

    Attributes:
        chosen: the family with the smallest mean share of active experts.
        values: its value for each batch size.
        confirmed: the chosen candidates on the other half of the text.
        raised: batch sizes whose value had to be raised when the other half did not confirm it.
    """

    chosen: Family
    values: dict[int, int]
    trials: list[Trial]
    confirmed: list[Trial]
    raised: list[int] = field(default_factory=list)


def families(num_experts: int, top_k: int, kinds: Sequence[str], similarity: bool) -> list[Family]:
    """What can be tried on a model of this size.

    Args:
        similarity: whether there is an artifact, so that weights can be mapped and SERE works.
    """
    counts = range(1, top_k)
    step = max(1, num_experts // BUDGET_STEPS)
    budgets = range(max(step, top_k // step * step), num_experts, step)
    found = []
    for kind, knob, values in (("budget", "max_active", budgets), ("oea", "k0", counts)):
        if kind in kinds:
            found.append(Family(kind, knob, values, {"kind": kind}))
        if kind in kinds and similarity:
            rest = {"kind": kind, "mapped_share": MAPPED_SHARE}
            found.append(Family(f"{kind}-mapped", knob, values, rest))
    if "sere" in kinds and similarity:
        rest = {"kind": "sere", "threshold": LOWEST_SIMILARITY}
        found.append(Family("sere", "num_primary", counts, rest))
    if "topk" in kinds:
        found.append(Family("topk", "k0", counts, {"kind": "topk"}))
    return found


def candidates(found: Iterable[Family]) -> dict[str, Definition]:
    """The ``policies`` section with every candidate of every family."""
    return {f.policy(value): f.definition(value) for f in found for value in f.values}


def halves(text: TokenizedText) -> tuple[TokenizedText, TokenizedText]:
    """Every other sequence of every source: one half to decide on, one to confirm on."""
    ids = text.token_ids
    return (
        TokenizedText(ids[::2], text.sources, text.seed),
        TokenizedText(ids[1::2], text.sources, text.seed),
    )


def tune(
    search: Evaluation,
    confirm: Evaluation,
    found: Sequence[Family],
    batch_sizes: Sequence[int],
    max_increase: float,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Tuning:
    """Find, choose, confirm.

    Args:
        max_increase: of the cross-entropy, as a share of vanilla's.

    Raises:
        BenchError: no family keeps the bound at every batch size.
    """
    trials: dict[tuple[str, int, int], Trial] = {}

    def attempt(family: Family, value: int, size: int) -> Trial:
        key = (family.name, value, size)
        if key not in trials:
            trials[key] = try_one(search, family, value, size, max_increase)
            on_trial(trials[key])
        return trials[key]

    best: dict[str, list[Trial]] = {}
    for family in found:
        safe = []
        for size in batch_sizes:
            to_beat = min((t.active for t in trials.values() if t.helps(size)), default=math.inf)
            smallest = _smallest(family, size, attempt, to_beat)
            if smallest is None:
                break
            safe.append(smallest)
        else:
            best[family.name] = safe
    if not best:
        raise BenchError(
            f"no policy keeps the cross-entropy within {max_increase:.2%} of vanilla's at batch "
            f"sizes {', '.join(map(str, batch_sizes))}: allow more with --max-ce-increase"
        )
    name = min(best, key=lambda name: _merit(best[name]))
    chosen = next(family for family in found if family.name == name)
    values = {trial.batch_size: trial.value for trial in best[name]}
    tuning = Tuning(chosen, values, list(trials.values()), [])
    for size in batch_sizes:
        _confirm(tuning, confirm, size, max_increase, on_trial)
    return tuning


def try_one(
    evaluation: Evaluation, family: Family, value: int, batch_size: int, max_increase: float
) -> Trial:
    """Measure one candidate."""
    setting = Setting(batch_size)
    vanilla = evaluation.vanilla(setting)
    measured = evaluation.measure(family.policy(value), setting)
    return Trial(
        family=family.name,
        value=value,
        batch_size=batch_size,
        cross_entropy=float(measured.losses.mean()),
        delta=increase(measured, vanilla),
        error=_standard_error(measured, vanilla),
        limit=max_increase * float(vanilla.losses.mean()),
        active=float(measured.active.mean()),
        active_base=float(vanilla.active.mean()),
    )


def _standard_error(measured: Measured, vanilla: Measured) -> float:
    differences = (measured.losses - vanilla.losses).mean(dim=1)
    return float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def _smallest(
    family: Family,
    batch_size: int,
    attempt: Callable[[Family, int, int], Trial],
    to_beat: float = math.inf,
) -> Trial | None:
    """The trial of the smallest safe value.

    None if none is safe, or as soon as none can be that runs at most `to_beat` experts.
    """
    low, high = 0, len(family.values)  # values below `low` are unsafe, from `high` on safe
    found = None
    while low < high:
        middle = (low + high) // 2
        trial = attempt(family, family.values[middle], batch_size)
        if trial.is_safe:
            found, high = trial, middle
        elif trial.active > to_beat:
            return None
        else:
            low = middle + 1
    return found


def _merit(trials: Sequence[Trial]) -> tuple[float, float]:
    """The smaller, the better: share of active experts to a tenth of a percent, then quality."""
    share = sum(trial.active / trial.active_base for trial in trials) / len(trials)
    return round(share, 3), sum(trial.delta.mean for trial in trials)


def _confirm(
    tuning: Tuning,
    confirm: Evaluation,
    batch_size: int,
    max_increase: float,
    on_trial: Callable[[Trial], None],
) -> None:
    """Measure the chosen value on unseen text; go to safer ones until the bound holds there."""
    family = tuning.chosen
    for value in (v for v in family.values if v >= tuning.values[batch_size]):
        trial = try_one(confirm, family, value, batch_size, max_increase)
        on_trial(trial)
        if trial.is_within:
            tuning.confirmed.append(trial)
            break
        tuning.raised.append(batch_size)
    else:
        raise BenchError(
            f"{family.name} at batch size {batch_size} breaks the bound on the other half of the "
            "text at every value: give more text, or allow more with --max-ce-increase"
        )
    tuning.values[batch_size] = value


def definition_of(tuning: Tuning) -> Definition:
    """The tuned policy: in force where it was measured, the safer value between two batch sizes."""
    sizes = sorted(tuning.values)
    schedule: dict[str, Any] = {"default": tuning.values[sizes[0]]}
    rows = dict(_steps(sizes, tuning.values))
    if rows:
        schedule["rows"] = rows
    knob = schedule if rows else schedule["default"]
    engage = {"min_rows": sizes[0], "max_rows": sizes[-1]}
    return {**tuning.chosen.definition(knob), "engage": engage}


def _steps(sizes: Sequence[int], values: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """``(rows, value)`` from where on another value holds."""
    current = values[sizes[0]]
    for below, size in itertools.pairwise(sizes):
        between = max(values[below], values[size])
        if size > below + 1 and between != current:
            yield below + 1, between
            current = between
        if values[size] != current:
            yield size, values[size]
            current = values[size]


def check_sizes(num_sequences: int, batch_sizes: Sequence[int]) -> None:
    """Raise `BenchError` unless both halves make whole batches of every size."""
    for size in batch_sizes:
        if num_sequences % (2 * size):
            raise BenchError(
                f"--num-sequences {num_sequences}: two halves of it do not make batches of {size}; "
                f"use a multiple of {2 * math.lcm(*batch_sizes)}"
            )
