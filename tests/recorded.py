"""Recorded MoE calls: obeyed rules, and the rules of the config, which each test states itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sglang_moe_routing.testing import check_calls

Numbers = Mapping[str, Any]
Rules = Mapping[str, Numbers] | Callable[[str, int, int], Numbers]


def check_recorded(
    calls: Iterable[Mapping[str, Any]],
    rules: Rules,
    similarity: Mapping[int, np.ndarray] | None = None,
) -> Counter[str]:
    """Hold calls to the oracle, and the rules in them to `rules`; rows by policy.

    Args:
        rules: what a policy is, by its name, or by name, layer and number of live rows: numbers
            that differ from vanilla's, and under "similarity" matrices by layer of its own.
        similarity: those of the others.
    """
    calls = list(calls)
    for call in calls:
        layer, num_live = call["layer"], sum(name is not None for name in call["rows"])
        for name, rule in zip(call["rows"], call["rules"], strict=True):
            if name is None:
                assert rule is None
                continue
            known = dict(rules(name, layer, num_live) if callable(rules) else rules[name])
            source, found = known.pop("similarity", similarity), dict(rule)
            if "similarity" in found:
                matrix = call["similarity"][found.pop("similarity")]["similarity"]
                assert source is not None
                assert np.array_equal(np.float32(matrix), source[layer].astype(np.float32)), name
            assert found == known, (name, layer, num_live)
    return Counter(check_calls(calls).rows)
