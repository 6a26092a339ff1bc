"""SGLang's real decode graph runner on a CPU, with a backend that re-executes.

Static buffers, bucket padding and capture order are SGLang's own. A replay runs the captured
function again, under `EmulatedGraphBackend.as_captured`, so that only what a real graph could see
reaches it. For tests of the graph contract.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend


class EmulatedGraphBackend(BaseCudaGraphBackend):  # type: ignore[misc]  # sglang is untyped
    """ "Captures" a forward by keeping it, "replays" by running it again."""

    as_captured: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Puts aside, during a replay, host state of others that no real graph could see."""

    def __init__(self, runner: Any, **kwargs: Any) -> None:
        self._forwards: dict[Any, Callable[[], Any]] = {}

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Any = None,
    ) -> None:
        forward_fn()
        self._forwards[shape_key] = forward_fn

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._forwards

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, forward_batch: Any, **kwargs: Any) -> Any:
        with self.as_captured():
            return self._forwards[shape_key]()

    def cleanup(self) -> None:
        self._forwards.clear()


class EmulatedDecodeGraphRunner(DecodeCudaGraphRunner):  # type: ignore[misc]  # sglang is untyped
    """The decode graph runner without device streams and without torch.compile."""

    def __init__(self, model_runner: Any, **kwargs: Any) -> None:
        backend = model_runner.attn_backend  # torch_native has no graph support of its own
        backend.init_cuda_graph_state = lambda *args, **kwargs: None
        backend.get_cuda_graph_seq_len_fill_value = lambda: 1
        super().__init__(model_runner, **kwargs)

    def warmup(self) -> None:
        pass

    def _capture_one_stream(self, stream_idx: int | None = None) -> None:
        self.compile_bs: list[int] = []
        super()._capture_one_stream(stream_idx)

    def _run_in_graph_metadata_prep(self, attn_backend: Any, forward_batch: Any) -> None:
        pass

    def _record_in_graph_metadata_prep_done(self) -> None:  # of 0.5.22
        pass

    def _resolve_shared_read_ends(self, attn_backend: Any, mode: Any) -> None:
        return None


def _graph_capture(stream: None) -> AbstractContextManager[SimpleNamespace]:
    return contextlib.nullcontext(SimpleNamespace(stream=stream))


decode_cuda_graph_runner.graph_capture = _graph_capture
decode_cuda_graph_runner.get_or_create_global_graph_capture_stream = lambda: None
