"""Search the policy with the fewest active experts within a bound on cross-entropy.

Every family of policies has one number that trades T for quality, and both are monotone in it, so
its smallest value within the bound is found by bisection, for each batch size by itself. Families
of one kind differ in how they weigh the experts that are left, which hardly moves T: once one of
them has its value, the others look below it only. A family is left once it cannot beat the best T
found at a batch size. The text is split: one half decides, the other confirms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifacts import METRICS
from ..errors import BenchError
from ..text import TokenizedText
from .measure import Evaluation, Interval, Measured, Setting, increase

BUDGET_STEPS = 32
"""Budgets are tried in steps of a 32nd of the experts."""

COMPENSATIONS = (0.8, 0.6, 0.4)
MAPPED_SHARE = 0.3
LOWEST_SIMILARITY = -1e9
"""A threshold that every similarity reaches: the primaries alone decide T."""

KINDS = ("budget", "oea", "sere", "topk", "lynx", "xshare")

Definition = dict[str, Any]
Values = Sequence[int]


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
    values: Values
    rest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.rest["kind"])

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


Attempt = Callable[[Family, int, int], Trial]
"""Measures a family's value at a batch size."""


def families(
    num_experts: int,
    top_k: int,
    kinds: Sequence[str],
    *,
    normalizes: bool = True,
    metric: str | None = None,
) -> list[Family]:
    """What can be tried on a model of this size.

    Args:
        normalizes: whether the model's weights of a token sum to one.
        metric: of the similarity artifact; None if there is none, so that neither can weights be
            mapped nor SERE work.
    """
    return [
        Family(f"{kind}{suffix}", knob, values, {**common, **weighing})
        for kind, (knob, values, common) in _knobs(num_experts, top_k).items()
        if kind in kinds and (metric or kind != "sere")
        for suffix, weighing in _weighings(kind, normalizes, metric)
    ]


def _knobs(num_experts: int, top_k: int) -> dict[str, tuple[str, Values, Definition]]:
    """Of every kind: the number to search, its values, and what all candidates have in common."""
    counts = range(1, top_k)
    step = max(1, num_experts // BUDGET_STEPS)
    budgets = range(max(step, top_k // step * step), num_experts, step)
    knobs: dict[str, tuple[str, Values]] = {
        **dict.fromkeys(("budget", "lynx", "xshare"), ("max_active", budgets)),
        **dict.fromkeys(("oea", "topk"), ("k0", counts)),
        "sere": ("num_primary", counts),
    }
    more = {"sere": {"threshold": LOWEST_SIMILARITY}}
    return {kind: (*knobs[kind], {"kind": kind, **more.get(kind, {})}) for kind in KINDS}


def _weighings(
    kind: str, normalizes: bool, metric: str | None
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Ways to weigh what is left, each with its suffix of the family's name.

    The first is the paper's. A compensation of 1 is the same, except where the weights are raw or
    SERE takes them from the artifact.
    """
    yield "", {}
    has_coefficients = metric is not None and METRICS[metric].has_coefficients
    is_paper = not has_coefficients if kind == "sere" else normalizes
    for share in COMPENSATIONS if is_paper else (1.0, *COMPENSATIONS):
        yield f"-c{share:g}", {"compensation": share}
    if metric and kind in ("budget", "oea"):
        yield "-mapped", {"mapped_share": MAPPED_SHARE}


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

    best: list[tuple[Family, list[Trial]]] = []
    for family in found:
        safe = _at_every_size(family, batch_sizes, attempt, best)
        if safe is not None:
            best.append((family, safe))
    if not best:
        raise BenchError(
            f"no policy keeps the cross-entropy within {max_increase:.2%} of vanilla's at batch "
            f"sizes {', '.join(map(str, batch_sizes))}: allow more with --max-ce-increase"
        )
    chosen, safe = min(best, key=lambda entry: _merit(entry[1]))
    values = {trial.batch_size: trial.value for trial in safe}
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


def _at_every_size(
    family: Family,
    batch_sizes: Sequence[int],
    attempt: Attempt,
    best: Sequence[tuple[Family, Sequence[Trial]]],
) -> list[Trial] | None:
    """The trials of its smallest safe values; None if it cannot beat the `best` at some size."""
    safe = []
    for place, size in enumerate(batch_sizes):
        to_beat = min((trials[place].active for _, trials in best), default=math.inf)
        alike = [trials[place] for other, trials in best if other.kind == family.kind]
        known = min(alike, key=lambda trial: trial.value, default=None)
        smallest = (
            _smallest(family, size, attempt, to_beat)
            if known is None
            else _smaller(family, size, attempt, to_beat, known)
        )
        if smallest is None:
            return None
        safe.append(smallest)
    return safe


def _smaller(
    family: Family, batch_size: int, attempt: Attempt, to_beat: float, known: Trial
) -> Trial | None:
    """The trial of the smallest safe value down from `known`, which suits a family of its kind.

    Weights alone seldom gain more than a step or two: walking takes fewer trials than bisection.
    """
    found = None
    for value in reversed([value for value in family.values if value < known.value]):
        trial = attempt(family, value, batch_size)
        if not trial.is_safe:
            break
        found = trial
    if found or known.active > to_beat:
        return found
    trial = attempt(family, known.value, batch_size)
    return trial if trial.is_safe else None


def _smallest(
    family: Family,
    batch_size: int,
    attempt: Attempt,
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
    """The smaller, the better: share of active experts to a percent, then quality."""
    share = sum(trial.active / trial.active_base for trial in trials) / len(trials)
    return round(share, 2), sum(trial.delta.mean for trial in trials)


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
