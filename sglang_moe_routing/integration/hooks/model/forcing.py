"""Teacher forcing, for ``evaluate`` alone: after ``ForwardBatch.init_new``, around
``ModelRunner.sample``.

Registered only where `environment.FORCE` is set. A request whose ``custom_params`` hold a list of
tokens gets them as its output, one by one, whatever the sampler picks; scheduler, batch, KV cache
and model are the real ones. The log-probability of each forced token and the model's own best token
come back in ``meta_info``, through SGLang's channel for customised output.

Why there: the first sees the requests, in row order; the second has the logits and decides which
tokens the next step is fed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .... import environment
from ....engine.hooking import Hook

_TOKENS = "_sglang_moe_routing_forced_tokens"
_FREE = -1


def attach_tokens(
    forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    mode = batch.forward_mode
    if mode.is_decode() or mode.is_extend():
        lengths = batch.seq_lens_cpu.tolist()  # beam members lie behind the requests
        tokens = [_next_token(r, n) for r, n in zip(batch.reqs, lengths, strict=False)]
        setattr(forward_batch, _TOKENS, tokens)


def _next_token(req: Any, length: int) -> int:
    """What comes after `length` tokens of prompt and output.

    Not a count of forwards: that of a retracted request is thrown away, and a chunk of a prompt
    samples nothing.
    """
    custom = req.sampling_params.custom_params
    tokens = custom.get(environment.FORCED_TOKENS) if isinstance(custom, dict) else None
    step = length - len(req.origin_input_ids)
    return tokens[step] if tokens and 0 <= step < len(tokens) else _FREE


def sample(
    original: Callable[..., Any], self: Any, logits_output: Any, forward_batch: Any
) -> torch.Tensor:
    tokens = getattr(forward_batch, _TOKENS, None)
    if not tokens or all(token == _FREE for token in tokens):
        return original(self, logits_output, forward_batch)  # type: ignore[no-any-return]
    logits = logits_output.next_token_logits[: len(tokens)].float()
    forced = torch.tensor(tokens, device=logits.device)
    log_probs = logits.log_softmax(dim=-1).gather(1, forced.clamp(min=0)[:, None])[:, 0]
    best = logits.argmax(dim=-1)
    found = list(zip(log_probs.tolist(), best.tolist(), strict=True))
    sampled = original(self, logits_output, forward_batch)
    logits_output.customized_info = {environment.FORCED_TOKENS: found}
    rows = slice(0, len(tokens))
    sampled[rows] = torch.where(forced == _FREE, sampled[rows], forced.to(sampled.dtype))
    return sampled  # type: ignore[no-any-return]


HOOKS = (
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="after",
        function=attach_tokens,
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.sample",
        kind="around",
        function=sample,
    ),
)
