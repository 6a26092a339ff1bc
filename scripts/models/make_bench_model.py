"""Write a random Qwen3-MoE checkpoint with the layers of Qwen3-30B-A3B, but few of them.

    python scripts/models/make_bench_model.py build/bench_model

For timing a server end to end where the real model does not fit. A layer is Qwen3-30B-A3B's in
every shape: hidden size 2048, 128 experts of 3 x 768 x 2048 of which a token uses 8 with normalised
weights, 32 attention heads and 4 KV heads of 128. There are 4 of 48 layers (5.0 GB in bfloat16) and
2,048 of 151,936 vocabulary entries, those of the bundled demo model's tokenizer. The real output
matrix of 622 MB weighs as much as 66 experts: 48 layers carry that, in 4 it would hide them.

What the random weights stand for:

- *Router.* Rows of N(0, s^2 / hidden): its input has an RMS of 1, so the logits of a token are
  N(0, s^2). s is 1.7, for which the 8 best of 128 experts hold 0.53 of the softmax. In a trained
  Qwen3-MoE model of 31.7 M parameters (6 layers, 64 experts, 8 per token) the best sixteenth held
  0.54 on held-out text, 0.47 to 0.72 by layer, and the logits' standard deviation was 1.66, 1.46 to
  2.33. In the bundled demo model, smaller and trained for less, they are 0.42 and 1.28. `--measure`
  prints these figures of a checkpoint on the demo's held-out text.
- *Everything else.* Matrices of N(0, 1 / inputs), embeddings of N(0, 1), norms of ones: every
  sublayer adds less to the residual stream than the token itself put there, so different tokens
  choose different experts. 16 served rows activate 81 experts a layer, sampled at temperature 1 or
  greedy; independent choices would 128 * (1 - (1 - 8 / 128)^16) = 82. The trained model of 64
  experts activated 55.9 in mixed batches of 16, where independent choices would 56.4.

The texts mean nothing, and neither would a quality figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[2] / "sglang_moe_routing" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROUTER_LOGIT_STD = 1.7
MEASURED_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; the defaults are a layer of Qwen3-30B-A3B."""

    layers: int = 4
    hidden: int = 2048
    moe_intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128


def make(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the checkpoint into `folder`, one file a layer; holds one layer in memory.

    Every tensor depends on `seed` and its own name alone.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = json.loads((DEMO / "model" / "config.json").read_text())
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "model" / name, folder / name)
    _write_json(folder / "config.json", config(shape, source))
    files: dict[str, str] = {}
    size = 0
    for number, shapes in enumerate(_shards(shape, source["vocab_size"]), start=1):
        file = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        size += _write_shard(folder / file, shapes, seed)
        files |= {name: file for name, _ in shapes}
    index = {"metadata": {"total_size": size}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)
    return folder


def config(shape: Shape, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the checkpoint.

    Args:
        tokenizer: config of the model whose tokenizer it shares.
    """
    special = {name: tokenizer.get(name) for name in ("bos_token_id", "eos_token_id")}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **special,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,  # of dense layers, which there are not
        "max_position_embeddings": 40_960,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.moe_intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "vocab_size": tokenizer["vocab_size"],
    }


def _shards(shape: Shape, vocab: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and sizes of the tensors of each file."""
    yield [
        ("model.embed_tokens.weight", (vocab, shape.hidden)),
        ("model.norm.weight", (shape.hidden,)),
        ("lm_head.weight", (vocab, shape.hidden)),
    ]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        sizes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (shape.hidden,),
            "post_attention_layernorm": (shape.hidden,),
            "self_attn.q_norm": (shape.head_dim,),
            "self_attn.k_norm": (shape.head_dim,),
            "self_attn.q_proj": (queries, shape.hidden),
            "self_attn.k_proj": (keys, shape.hidden),
            "self_attn.v_proj": (keys, shape.hidden),
            "self_attn.o_proj": (shape.hidden, queries),
            "mlp.gate": (shape.experts, shape.hidden),
        }
        for expert in range(shape.experts):
            for part in ("gate_proj", "up_proj"):
                sizes[f"mlp.experts.{expert}.{part}"] = (shape.moe_intermediate, shape.hidden)
            sizes[f"mlp.experts.{expert}.down_proj"] = (shape.hidden, shape.moe_intermediate)
        yield [(f"model.layers.{layer}.{name}.weight", size) for name, size in sizes.items()]


def _write_shard(path: Path, shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> int:
    """Returns: bytes of the tensors written."""
    tensors = {name: _weight(name, sizes, seed) for name, sizes in shapes}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _weight(name: str, sizes: tuple[int, ...], seed: int) -> Tensor:
    """bfloat16 tensor of `sizes`; see the module's docstring for its distribution."""
    if len(sizes) == 1:
        return torch.ones(sizes, dtype=torch.bfloat16)  # a norm
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    std = 1.0 if "embed_tokens" in name else sizes[1] ** -0.5
    if name.endswith("mlp.gate.weight"):
        std *= ROUTER_LOGIT_STD
    return torch.empty(sizes, dtype=torch.bfloat16).normal_(0, std, generator=generator)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@torch.no_grad()
def measure(folder: Path) -> list[tuple[float, float]]:
    """Router statistics of a checkpoint on the demo's held-out text, layer by layer.

    Returns:
        Mean over tokens of the standard deviation of their router logits, and of the share of the
        softmax that the best sixteenth of the experts holds.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    figures: list[tuple[float, float]] = []

    def look(router: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        tokens = args[0].flatten(0, -2).float()  # [tokens, hidden]
        logits = tokens @ router.weight.float().T  # [tokens, experts]
        best = logits.softmax(-1).topk(logits.shape[1] // 16).values
        figures.append((float(logits.std(-1).mean()), float(best.sum(-1).mean())))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(look)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    model(ids[0, :MEASURED_TOKENS].view(-1, 256))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where to write the model.")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--moe-intermediate", type=int, default=Shape.moe_intermediate)
    parser.add_argument("--experts", type=int, default=Shape.experts)
    parser.add_argument("--top-k", type=int, default=Shape.top_k)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="Measure `folder` instead.")
    args = parser.parse_args()
    if args.measure:
        for layer, (std, mass) in enumerate(measure(args.folder)):
            print(f"layer {layer}: logit std {std:.2f}, best sixteenth holds {mass:.3f}")
        return
    shape = Shape(
        layers=args.layers,
        hidden=args.hidden,
        moe_intermediate=args.moe_intermediate,
        experts=args.experts,
        top_k=args.top_k,
    )
    make(args.folder, shape, args.seed)
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"{args.folder}: {shape.layers} layers, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
