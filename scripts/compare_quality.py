"""Compare two policies of one evaluation, sequence by sequence.

    python scripts/compare_quality.py RESULTS BATCH POLICY POLICY

Prints the mean difference of their cross-entropy (first - second, nats per token) with its 95 %
bootstrap interval over sequences, and their active experts. Both must follow the same sequences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sglang_moe_routing.evaluation.measure import bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of evaluate")
    parser.add_argument("batch", help="batch size")
    parser.add_argument("policies", nargs=2, metavar="POLICY")
    args = parser.parse_args()
    sections = json.loads(args.results.read_text(encoding="utf-8"))["policies"]
    try:
        first, second = (sections[name][args.batch] for name in args.policies)
    except KeyError as error:
        sys.exit(f"{args.results}: nothing measured for {error}")
    losses = [torch.tensor(found["sequence_losses"]).double() for found in (first, second)]
    found = bootstrap(losses[0] - losses[1])
    print(
        f"{args.policies[0]} (T {first['active_experts']:.2f}) - "
        f"{args.policies[1]} (T {second['active_experts']:.2f}): "
        f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    )


if __name__ == "__main__":
    main()
