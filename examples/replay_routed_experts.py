"""A rollout under a policy, and a trainer's forward that uses the experts that ran.

    python replay_routed_experts.py MODEL [URL] [POLICY]

Reinforcement learning needs the log-probabilities that the rollout was sampled with. A trainer that
routes by itself computes those of another model: the server re-routed. A server with
--enable-return-routed-experts says which experts ran, and the trainer sends each token to them.
MODEL is a Qwen3-MoE that transformers loads.
"""

import base64
import sys
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

PROMPTS = ["Once upon a time", "It was the best of", "The first thing that"]


def roll_out(url: str, policy: str) -> list[dict[str, Any]]:
    """Token ids, log-probabilities of the generated ones, and the experts of all but the last."""
    body = {
        "text": PROMPTS,
        "sampling_params": {"max_new_tokens": 32, "temperature": 1, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_routed_experts": True,
    }
    headers = {"X-MoE-Routing-Policy": policy}
    answers = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=300).json()
    found = []
    for answer in answers:
        info = answer["meta_info"]
        scored = info["input_token_logprobs"] + info["output_token_logprobs"]
        routed = np.frombuffer(base64.b64decode(info["routed_experts"]), dtype=np.int32)
        found.append(
            {
                "tokens": torch.tensor([token for _, token, *_ in scored]),
                "logprobs": torch.tensor([p for p, *_ in info["output_token_logprobs"]]),
                "experts": torch.from_numpy(routed.copy()).view(len(scored) - 1, -1),
            }
        )
    return found


class Replay:
    """Sends the tokens of a transformers Qwen3-MoE to given experts, or, without any, routes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.experts: Tensor | None = None
        """Ids, ``[tokens, layers * top_k]``."""
        self.layers = list(model.model.layers)
        for index, layer in enumerate(self.layers):
            layer.mlp.gate.register_forward_hook(self._keep_logits)
            layer.mlp.experts.register_forward_pre_hook(
                lambda _, arguments, index=index: self._send(index, *arguments)
            )

    def _keep_logits(self, gate: torch.nn.Module, arguments: Any, output: Any) -> None:
        self.logits = output[0]

    def _send(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Any:
        if self.experts is None:
            return hidden, ids, weights
        given = self.experts.view(len(self.experts), len(self.layers), -1)[:, index].long()
        # a mask: a slot that holds no expert repeats the row's first one, which counts once
        mask = torch.zeros_like(self.logits).scatter_(1, given, 1)
        best = (self.logits.softmax(dim=-1) * mask).topk(ids.shape[1])
        normalised = best.values / best.values.sum(dim=1, keepdim=True)
        return hidden, best.indices, normalised.to(weights.dtype)


def logprobs(model: torch.nn.Module, tokens: Tensor, num_generated: int) -> Tensor:
    """Those of the last tokens, from one forward of all, as a trainer computes them."""
    logits = model(tokens[None, :-1], use_cache=False).logits[0].float()
    chosen = logits.log_softmax(dim=-1).gather(1, tokens[1:, None])[:, 0]
    return chosen[-num_generated:]


def main(model: str, url: str = "http://127.0.0.1:30000", policy: str = "topk-k3") -> None:
    trainer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    replay = Replay(trainer)
    differences: dict[str, list[Tensor]] = {"its own experts": [], "those that ran": []}
    for rollout in roll_out(url, policy):
        for name, experts in zip(differences, (None, rollout["experts"]), strict=True):
            replay.experts = experts
            with torch.no_grad():
                found = logprobs(trainer, rollout["tokens"], len(rollout["logprobs"]))
            differences[name].append((found - rollout["logprobs"]).abs())
    for name, values in differences.items():
        print(f"{policy}, trainer with {name}: off by {torch.cat(values).mean():.4f} nats a token")


if __name__ == "__main__":
    main(*sys.argv[1:])
