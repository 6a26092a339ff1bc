"""Teacher-forced decoding on a running server: the text decides every token, the model is scored.

A batch of sequences is sent as one request, so that all of them are prefilled together and then
advance together, one token a step. The server must have been started with `environment.FORCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
import torch
from torch import Tensor

from .. import environment
from ..config import BODY_KEY
from ..errors import BenchError, EngineError
from ..serving.load import COUNTS

_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Forced:
    """One batch, decoded.

    Attributes:
        losses: float64 ``[num_sequences, num_steps]``, nats.
        best: int64 ``[num_sequences, num_steps]``, the token that the model liked best.
        active: float64 ``[num_layers]``, mean distinct experts of a step (T).
        active_base: the same of the router's own choice (T_base).
    """

    losses: Tensor
    best: Tensor
    active: Tensor
    active_base: Tensor


def server_flags(batch_size: int, prefix_len: int) -> list[str]:
    """What a server needs to decode batches of this size, besides `environment.FORCE`."""
    prompts = str(max(2048, batch_size * prefix_len))  # of one batch, prefilled in one piece
    return [
        "--disable-radix-cache",  # equal work for every policy
        "--disable-overlap-schedule",  # no step beyond the last token, so that counts are exact
        *("--max-running-requests", str(batch_size)),
        *("--chunked-prefill-size", prompts),
        *("--max-prefill-tokens", prompts),
    ]


class ForcedDecoder:
    """Sends batches to one server. Nobody else may use it meanwhile: its counts are read.

    Args:
        url: server root.
        check: called when the server does not answer; may raise a better error.
    """

    def __init__(self, url: str, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def run(self, token_ids: Tensor, prefix_len: int, policies: Sequence[str]) -> Forced:
        """Decode one batch.

        The first `prefix_len` tokens are the prompt. Token ``prefix_len`` comes out of prefill and
        is not scored; each later one is, by the step that its predecessor was the input of.

        Args:
            token_ids: int64 ``[num_sequences, prefix_len + 1 + num_steps]``.
            policies: of each sequence.

        Raises:
            EngineError: the server failed, or does not force tokens.
            BenchError: the engine split the batch, so that its steps had other rows than asked for.
        """
        before = self._counts()
        answers = self._generate(token_ids, prefix_len, policies)
        counts = self._counts() - before
        num_steps = token_ids.shape[1] - prefix_len - 1
        _check_steps(counts, len(token_ids), num_steps)
        scored = torch.tensor(answers, dtype=torch.float64)[:, 1:]
        calls, _, active, active_base = counts.double().unbind(dim=1)
        return Forced(-scored[..., 0], scored[..., 1].long(), active / calls, active_base / calls)

    def _generate(
        self, token_ids: Tensor, prefix_len: int, policies: Sequence[str]
    ) -> list[list[tuple[float, int]]]:
        tokens = token_ids.tolist()
        body = {
            "input_ids": [row[:prefix_len] for row in tokens],
            "sampling_params": [
                _sampling(row[prefix_len:], policy)
                for row, policy in zip(tokens, policies, strict=True)
            ],
        }
        answers = self._call("POST", "/generate", json=body).json()
        found = [answer["meta_info"].get(environment.FORCED_TOKENS) for answer in answers]
        wanted = [row[prefix_len:] for row in tokens]
        if [answer["output_ids"] for answer in answers] != wanted or None in found:
            raise EngineError(
                f"the server does not force tokens: it was started without {environment.FORCE}=1"
            )
        return found

    def _counts(self) -> Tensor:
        """int64 ``[num_layers, 4]``: `COUNTS` since the server's start."""
        workers = self._call("GET", "/v1/moe_routing/statistics").json()["data"]
        if len(workers) != 1:
            raise EngineError(f"{len(workers)} data-parallel workers: only one can be measured")
        (worker,) = workers
        if not worker["layers"]:
            raise EngineError("the server counts nothing: its config says 'statistics: false'")
        return torch.tensor([[layer[name] for name in COUNTS] for layer in worker["layers"]])

    def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            self._check()
            raise EngineError(f"no answer from the server: {error!r}") from error
        if response.is_error:
            raise EngineError(f"the server answered {response.status_code}: {response.text[:500]}")
        return response


def _sampling(tokens: Sequence[int], policy: str) -> Mapping[str, Any]:
    return {
        "max_new_tokens": len(tokens),
        "temperature": 0.0,
        "ignore_eos": True,
        "custom_params": {BODY_KEY: policy, environment.FORCED_TOKENS: list(tokens)},
    }


def _check_steps(counts: Tensor, num_sequences: int, num_steps: int) -> None:
    calls, rows = counts[:, 0], counts[:, 1]
    if bool((calls == num_steps).all() and (rows == num_steps * num_sequences).all()):
        return
    raise BenchError(
        f"{num_steps} steps of {num_sequences} sequences were asked for, the engine ran "
        f"{int(calls[0])} with {int(rows[0])} rows: raise --max-running-requests, "
        "--max-prefill-tokens or the memory of its KV cache, or lower --batch-sizes"
    )
