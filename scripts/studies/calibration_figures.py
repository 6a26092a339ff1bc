"""Measure `calibrate` on a large model: peak memory, time per layer, share of matrix products.

    python scripts/models/make_bench_model.py build/bench_model
    python scripts/studies/calibration_figures.py build/bench_model --data build/text.txt

The command itself is run for memory and times. The share is that of torch's matrix products in a
profiled run of fewer sequences, in this process. Writes build/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from sglang_moe_routing.calibration.calibrate import Calibration
from sglang_moe_routing.calibration.streaming import StreamedModel
from sglang_moe_routing.checkpoint import read_headers
from sglang_moe_routing.serving.machine import describe_machine
from sglang_moe_routing.text import read_text

OUT = Path(__file__).resolve().parents[2] / "build" / "calibration.json"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
SEQUENCE_LENGTH = 128


def expert_bytes(model: Path, layer: int) -> int:
    """Size of one layer's routed experts in the checkpoint."""
    stored = read_headers(model)
    mine = [t for name, t in stored.items() if f"layers.{layer}.mlp.experts." in name]
    return sum(tensor.stop - tensor.start for tensor in mine)


def run_command(args: argparse.Namespace, metric: str, out: Path) -> dict[str, Any]:
    """Peak memory and seconds of the command, in a process of its own."""
    command = [
        *(sys.executable, "-m", "sglang_moe_routing", "calibrate", str(args.model)),
        *("--data", str(args.data), "--out", str(out), "--metric", metric),
        *("--num-sequences", str(args.sequences), "--layers", args.layers, "--json"),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak > before, "an earlier process was larger; measure each metric alone"
    return {"peak_bytes": peak * 1024, "seconds": json.loads(done.stdout)["seconds"]}


def product_share(args: argparse.Namespace, metric: str, out: Path) -> float:
    """Share of a layer's time that goes to matrix products."""
    model = StreamedModel(str(args.model))
    text = read_text(
        [str(args.data)],
        AutoTokenizer.from_pretrained(args.model),
        num_sequences=args.profiled_sequences,
        sequence_length=SEQUENCE_LENGTH,
    )
    run = Calibration(model, args.model.name, metric, out, text, layers=[0])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run.run()
    events = profiled.key_averages()
    spent = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    timings = run.timings[0]
    return spent / 1e6 / (timings.load + timings.forward + timings.similarity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--metric", default="routed")
    parser.add_argument("--layers", default="0-1")
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--profiled-sequences", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        measured = run_command(args, args.metric, Path(scratch) / "run.safetensors")
        share = product_share(args, args.metric, Path(scratch) / "profiled.safetensors")
    experts = expert_bytes(args.model, 0)
    result = {
        "machine": describe_machine(),
        "layers": args.layers,
        "metric": args.metric,
        "tokens": args.sequences * SEQUENCE_LENGTH,
        "expert_bytes_of_a_layer": experts,
        "peak_bytes": measured["peak_bytes"],
        "peak_limit_bytes": 3 * experts + (1 << 30),
        "seconds": measured["seconds"],
        "matrix_product_share": round(share, 3),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
