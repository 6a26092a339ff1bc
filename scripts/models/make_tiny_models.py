"""Write tiny random-weight checkpoints of the MoE families that SGLang routes with `TopK`.

    python scripts/models/make_tiny_models.py qwen2_moe deepseek_v3 --out build/tiny_models

Every checkpoint is a real one of its family (transformers' config and model classes) of three
layers and less than 3 MB in float32, with the tokenizer of the bundled demo model. A random
expert-similarity file lies next to it: inside, SGLang would take it for weights. Weights depend on
the family's name alone. Serve them with ``--dtype float32``: SGLang would otherwise halve the
precision.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from sglang_moe_routing.artifacts import SimilarityArtifact, save_artifact
from sglang_moe_routing.checkpoint import fingerprint, read_headers

DEMO_MODEL = Path(__file__).resolve().parents[2] / "sglang_moe_routing" / "demo" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHT_STD = 0.1  # lively enough that routers tell experts apart
BIAS_STD = 0.05

_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_DEEPSEEK: Mapping[str, Any] = {
    **_SIZES,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 256,  # with the next but one: a pair that the Triton attention knows
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,  # transformers rotates this many dimensions
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    # SGLang knows no other kind for DeepSeek on a CPU
    "rope_parameters": {**_YARN, "rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}


@dataclass(frozen=True)
class Family:
    """How to configure a tiny model of one family.

    Attributes:
        config: name of the transformers config class.
        settings: its arguments, token ids and vocabulary size not included.
        extra: entries of ``config.json`` that the engine reads and the class does not write.
    """

    config: str
    settings: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {
            **_SIZES,
            "head_dim": 16,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {
            **_SIZES,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
    ),
    "mixtral": Family(
        "MixtralConfig",
        {
            **_SIZES,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "olmoe": Family(
        "OlmoeConfig",
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v2": Family(  # as DeepSeek-V2-Lite, but with its larger sibling's groups
        "DeepseekV2Config",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
        },
        extra={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {**_DEEPSEEK, "q_lora_rank": 32, "norm_topk_prob": True},
        extra={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        {
            **_SIZES,
            "head_dim": 16,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "use_qk_norm": True,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            **_SIZES,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "rope_parameters": {**_YARN, "rope_theta": 150_000.0, "truncate": False},
        },
    ),
}


def make(family: str, folder: Path, tokenizer: Path = DEMO_MODEL) -> Path:
    """Write a checkpoint of `family` into `folder`, created if need be.

    Args:
        tokenizer: model folder whose tokenizer and special token ids to use.

    Returns:
        `folder`.
    """
    entry = FAMILIES[family]
    source = json.loads((tokenizer / "config.json").read_text())
    special = {name: source.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, entry.config)(
        **entry.settings,
        vocab_size=source["vocab_size"],
        **{f"{name}_token_id": token for name, token in special.items()},
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, generator)
    model.save_pretrained(folder)
    _merge(folder / "config.json", entry.extra)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return folder


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Matrices and biases are random; norms keep their ones."""
    state = model.state_dict()
    for name, tensor in sorted(state.items()):
        if "norm" in name or not tensor.is_floating_point():
            continue
        is_vector = tensor.dim() == 1 or name.endswith("bias")
        scale = BIAS_STD if is_vector else WEIGHT_STD
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def _merge(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}, indent=2) + "\n")


def make_similarity(folder: Path, out: Path) -> Path:
    """Write random similarities for the MoE layers of the checkpoint in `folder`.

    Returns:
        `out`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    num_experts = _num_experts(folder)
    matrices = {}
    for layer in moe_layers(folder):
        matrix = torch.rand(num_experts, num_experts, generator=generator)
        matrix = (matrix + matrix.T) / 2
        matrices[layer] = matrix.fill_diagonal_(1.0)
    artifact = SimilarityArtifact(
        matrices=matrices,
        metric="frobenius",
        model=folder.name,
        fingerprint=fingerprint(read_headers(folder)),
    )
    save_artifact(artifact, out)
    return out


def _num_experts(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next(int(config[name]) for name in names if name in config)


def moe_layers(folder: Path) -> list[int]:
    """Ids of the layers of a checkpoint that have routed experts."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    return sorted({int(name.split(".")[2]) for name in names if ".experts." in name})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("build/tiny_models"))
    parser.add_argument(
        "--tokenizer", type=Path, default=DEMO_MODEL, help="Folder of the tokenizer."
    )
    args = parser.parse_args()
    for family in args.families:
        folder = make(family, args.out / family, args.tokenizer)
        make_similarity(folder, args.out / f"{family}.similarity.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: MoE layers {moe_layers(folder)}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
