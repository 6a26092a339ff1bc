"""Two policies of one evaluation compared, sequence by sequence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import BenchError
from .measure import bootstrap


class Pair(NamedTuple):
    """Names of two policies: the first one minus the second."""

    first: str
    second: str


def parse_pairs(texts: Iterable[str], measured: Collection[str]) -> list[Pair]:
    """What ``--pairs`` names, each once.

    Args:
        texts: of the form ``A:B``.
        measured: names of the policies that the evaluation measures.

    Raises:
        BenchError: a text is no pair, or names what is not measured.
    """
    return list(dict.fromkeys(_parse(text, measured) for text in texts))


def _parse(text: str, measured: Collection[str]) -> Pair:
    names = [name.strip() for name in text.split(":")]
    if len(names) != 2 or not all(names):
        raise BenchError(f"--pairs {text!r}: expected two policies as in 'budget:oea'")
    for name in names:
        if name not in measured:
            raise BenchError(
                f"--pairs {text!r}: policy {name!r} is not measured; measured: "
                f"{', '.join(measured)}"
            )
    pair = Pair(*names)
    if pair.first == pair.second:
        raise BenchError(f"--pairs {text!r}: a policy does not differ from itself")
    return pair


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Cross-entropy of the first minus the second, nats per token, paired by sequence.

    Args:
        first, second: `figures` of the same sequences in the same batches. A single sequence, or
            a loss that is no number, tells nothing from 0.
    """
    losses = torch.tensor(
        [first["sequence_losses"], second["sequence_losses"]], dtype=torch.float64
    )
    difference = bootstrap(losses[0] - losses[1])
    tells = losses.shape[1] > 1 and bool(losses.isfinite().all())
    return {
        "difference": difference.mean,
        "ci95": [difference.low, difference.high],
        "told_from_0": tells and not difference.low <= 0 <= difference.high,
        "active_experts_first": first["active_experts"],
        "active_experts_second": second["active_experts"],
    }
