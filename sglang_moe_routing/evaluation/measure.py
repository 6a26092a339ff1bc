"""Which policies decode which batches, and what becomes of their cross-entropy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..config import VANILLA
from ..errors import BenchError
from ..text import TokenizedText
from .forced import Forced, ForcedDecoder

Grouping = Literal["mixed", "same"]
"""Whether a batch mixes the sources of the text or keeps to one."""

RESAMPLES = 10_000


@dataclass(frozen=True)
class Setting:
    """How batches are made.

    Attributes:
        batch_size: sequences that advance together.
        grouping: see `Grouping`.
        vanilla_share: share of each batch's sequences that stay vanilla.
    """

    batch_size: int
    grouping: Grouping = "mixed"
    vanilla_share: float = 0.0

    @property
    def num_vanilla(self) -> int:
        """Sequences of each batch that stay vanilla: at least one, if any."""
        wanted = round(self.vanilla_share * self.batch_size)
        return min(max(wanted, 1), self.batch_size - 1) if self.vanilla_share else 0


@dataclass(frozen=True)
class Measured:
    """One policy in one setting.

    Attributes:
        losses: float64 ``[num_sequences, num_steps]`` in the order of the text, nats.
        best: int64 ``[num_sequences, num_steps]``, the token that the model liked best.
        follows: bool ``[num_sequences]``, sequences under the policy; the others were vanilla.
        active, active_base: float64 ``[num_layers]``, mean distinct experts of a step.
    """

    policy: str
    setting: Setting
    losses: Tensor
    best: Tensor
    follows: Tensor
    active: Tensor
    active_base: Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass
class Evaluation:
    """Measures policies on one text with one server.

    Args:
        text: sequences of ``prefix_len + 1 + num_steps`` tokens, in equal parts from its sources.
        prefix_len: tokens of each prompt.
        seed: of the grouping of sequences into batches.
    """

    decoder: ForcedDecoder
    text: TokenizedText
    prefix_len: int
    seed: int = 0
    _vanilla: dict[tuple[int, Grouping], Measured] = field(default_factory=dict)

    def measure(self, policy: str, setting: Setting) -> Measured:
        """Decode the whole text under `policy`. Raises as `ForcedDecoder.run` does."""
        order = batches(self.text, setting, self.seed)
        names = [VANILLA] * setting.num_vanilla
        names += [policy] * (setting.batch_size - setting.num_vanilla)
        ids = self.text.token_ids
        done = [self.decoder.run(ids[rows], self.prefix_len, names) for rows in order]
        follows = torch.arange(setting.batch_size) >= setting.num_vanilla
        return _gather(policy, setting, done, order, follows)

    def vanilla(self, setting: Setting) -> Measured:
        """What others are compared with: the same batches without any policy, run once."""
        key = (setting.batch_size, setting.grouping)
        if key not in self._vanilla:
            self._vanilla[key] = self.measure(VANILLA, Setting(*key))
        return self._vanilla[key]


def batches(text: TokenizedText, setting: Setting, seed: int) -> Tensor:
    """int64 ``[num_batches, batch_size]``: which sequences decode together.

    Raises:
        BenchError: the sequences do not make whole batches.
    """
    num_sequences, num_sources = len(text.token_ids), len(text.sources)
    generator = torch.Generator().manual_seed(seed)
    if setting.grouping == "mixed":
        parts = [torch.randperm(num_sequences, generator=generator)]
    else:
        parts = list(torch.arange(num_sequences).tensor_split(num_sources))  # as `read_text` does
    for part in parts:
        if len(part) % setting.batch_size or len(part) == 0:
            where = "" if setting.grouping == "mixed" else " of each source"
            raise BenchError(
                f"{len(part)} sequences{where} do not make batches of {setting.batch_size}: choose "
                "--num-sequences so that every batch size divides them"
            )
    return torch.cat([part.view(-1, setting.batch_size) for part in parts])


def _gather(
    policy: str, setting: Setting, done: Sequence[Forced], order: Tensor, follows: Tensor
) -> Measured:
    places = order.flatten().argsort()
    return Measured(
        policy=policy,
        setting=setting,
        losses=torch.cat([batch.losses for batch in done])[places],
        best=torch.cat([batch.best for batch in done])[places],
        follows=follows.repeat(len(order))[places],
        active=torch.stack([batch.active for batch in done]).mean(dim=0),
        active_base=torch.stack([batch.active_base for batch in done]).mean(dim=0),
    )


def increase(measured: Measured, vanilla: Measured, follows: bool = True) -> Interval:
    """Cross-entropy over vanilla's, nats per token, paired by sequence.

    Args:
        follows: whether to look at the sequences under the policy or at the vanilla ones.
    """
    rows = measured.follows == follows
    return bootstrap((measured.losses - vanilla.losses)[rows].mean(dim=1))


def bootstrap(differences: Tensor, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval of ``[n]`` paired differences."""
    generator = torch.Generator().manual_seed(seed)
    n = len(differences)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    low, high = differences[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975]).double())
    return Interval(float(differences.mean()), float(low), float(high))


def figures(measured: Measured, vanilla: Measured) -> dict[str, object]:
    """What is reported of one policy in one setting."""
    rows = measured.follows
    delta = increase(measured, vanilla)
    cross_entropy = float(measured.losses[rows].mean())
    found: dict[str, object] = {
        "cross_entropy": cross_entropy,
        "delta": delta.mean,
        "ci95": [delta.low, delta.high],
        "perplexity": math.exp(cross_entropy),
        "agreement": float((measured.best == vanilla.best)[rows].double().mean()),
        "active_experts": float(measured.active.mean()),
        "active_experts_base": float(vanilla.active.mean()),
        "active_share": float(measured.active.mean() / vanilla.active.mean()),
        "active_experts_per_layer": [round(value, 3) for value in measured.active.tolist()],
        "active_experts_base_per_layer": [round(value, 3) for value in vanilla.active.tolist()],
        "tokens": int(rows.sum()) * measured.losses.shape[1],
        "sequence_losses": [round(x, 6) for x in measured.losses.mean(dim=1)[rows].tolist()],
    }
    if not bool(rows.all()):
        others = increase(measured, vanilla, follows=False)
        change = (measured.losses - vanilla.losses)[~rows].mean(dim=1).abs().max()
        found["vanilla_rows"] = {
            "delta": others.mean,
            "ci95": [others.low, others.high],
            "largest_change_of_a_sequence": float(change),
            "agreement": float((measured.best == vanilla.best)[~rows].double().mean()),
        }
    return found


def rounding(runs: Sequence[Measured]) -> dict[str, float] | None:
    """How much vanilla's own losses change with the batch, over pairs of vanilla runs."""
    pairs = itertools.combinations(runs, 2)
    changes = [(one.losses - other.losses).mean(dim=1).abs() for one, other in pairs]
    if not changes:
        return None
    every = torch.stack(changes)
    return {
        "mean_change_of_a_sequence": float(every.mean()),
        "largest_change_of_a_sequence": float(every.max()),
    }
