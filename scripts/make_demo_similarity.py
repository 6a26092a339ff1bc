"""Compute the expert-similarity file of the bundled demo model (SERE's Frobenius metric).

    python scripts/make_demo_similarity.py --text build/demo_model/calibration.txt

Every expert of every MoE layer runs on the MoE input of every calibration token, not only of those
routed to it. With A_p the outputs of expert p, d_pq = ||A_p - A_q||_F and Sim = 1 - d_pq / max(d)
(SERE, arXiv 2602.07616, section 3). The calibration text is written by train_demo_model.py.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_moe_routing.artifacts import SimilarityArtifact, save_artifact

DEMO_DIR = Path(__file__).resolve().parents[1] / "sglang_moe_routing" / "demo"


class GramAccumulator:
    """Sums <A_p, A_q> over the tokens that pass through one MoE layer.

    Attributes:
        gram: float64 [num_experts, num_experts].
    """

    def __init__(self, block: nn.Module):
        self.experts = block.experts
        num_experts = self.experts.num_experts
        self.gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        block.register_forward_pre_hook(self)

    def __call__(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].flatten(0, -2)  # [tokens, hidden]
        gate, up = (tokens @ self.experts.gate_up_proj.mT).chunk(
            2, dim=-1
        )  # [experts, tokens, ...]
        outputs = (self.experts.act_fn(gate) * up) @ self.experts.down_proj.mT
        flat = outputs.flatten(1).double()  # [experts, tokens * hidden]
        self.gram += flat @ flat.T

    def similarity(self) -> Tensor:
        """1 - d_pq / max(d). Returns: float64 [num_experts, num_experts], in [0, 1]."""
        norms = self.gram.diagonal()
        distance = (norms[:, None] + norms[None, :] - 2 * self.gram).clamp_min(0).sqrt()
        distance = ((distance + distance.T) / 2).fill_diagonal_(0)
        return 1 - distance / distance.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_DIR / "model")
    parser.add_argument("--text", type=Path, default=Path("build/demo_model/calibration.txt"))
    parser.add_argument("--out", type=Path, default=DEMO_DIR / "similarity.safetensors")
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    if len(rows) < args.sequences:
        parser.error(f"{args.text} holds {len(rows)} sequences, expected {args.sequences}")
    # Spread the choice over the whole text, so that every domain counts.
    rows = rows[torch.linspace(0, len(rows) - 1, args.sequences).long()]

    accumulators = {i: GramAccumulator(layer.mlp) for i, layer in enumerate(model.model.layers)}
    with torch.no_grad():
        for batch in rows.split(args.batch_size):
            model(input_ids=batch, use_cache=False)

    matrices = {i: accumulator.similarity() for i, accumulator in accumulators.items()}
    off_diagonal = ~torch.eye(next(iter(matrices.values())).shape[0], dtype=torch.bool)
    levels = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
    for layer, matrix in matrices.items():
        quantiles = matrix[off_diagonal].quantile(levels)
        print(
            f"layer {layer}: min, 5 %, median, 95 %, max:",
            [round(q, 3) for q in quantiles.tolist()],
        )
    details = {
        "calibration_sequences": args.sequences,
        "calibration_tokens": rows.numel(),
        "calibration_text": "training-side text of the demo model, all domains in equal parts",
        "calibration_text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "model_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "inference_dtype": "float32",
        "accumulate_dtype": "float64",
        "transformers": transformers.__version__,
        "script": "scripts/make_demo_similarity.py",
    }
    half = {layer: matrix.to(torch.float16) for layer, matrix in matrices.items()}
    save_artifact(SimilarityArtifact(half, "frobenius", "moe-routing-demo", details), args.out)
    args.out.chmod(0o644)


if __name__ == "__main__":
    main()
