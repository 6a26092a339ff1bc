"""Find a model's experts by structure, run any of them on any token, and watch the router.

No model file is copied: an expert is run by the model's own code. Two structures are known.

- *Fused*: a module whose parameters hold all experts along their first dimension and whose
  ``forward`` takes (hidden states, expert ids, combine weights), as every MoE model of transformers
  5 has. An expert's output is what the module returns when every token goes to it at weight 1.
- *A list* of modules that each map hidden states to hidden states, as in models with code of their
  own. Combine weights are found by probing: see `ExpertList`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError

NUM_ARGUMENTS = 3  # hidden states, expert ids, combine weights


@dataclass
class Routing:
    """What one MoE layer saw in one forward.

    Attributes:
        hidden: ``[num_tokens, hidden]``, the experts' input.
        topk_ids: int64 ``[num_tokens, top_k]``.
        topk_weights: ``[num_tokens, top_k]``, the model's own combine weights.
        combined: ``[num_tokens, hidden]``, what the routed experts gave together.
    """

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    combined: Tensor


class Experts(ABC):
    """The routed experts of one MoE layer.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        module: the experts.
        block: what they and their router are parts of.
        num_experts: N.
    """

    def __init__(self, name: str, module: nn.Module, block: nn.Module, num_experts: int):
        self.name = name
        self.module = module
        self.block = block
        self.num_experts = num_experts

    @abstractmethod
    def run(self, expert: int, hidden: Tensor) -> Tensor:
        """Output of one expert for every token: ``[num_tokens, hidden]``, unweighted."""

    @abstractmethod
    def watch(self) -> Any:
        """Context manager that yields a list; every forward inside adds its `Routing`."""

    def router(self, hidden_size: int) -> Tensor:
        """The router's matrix: ``[N, hidden]``, a row per expert.

        Raises:
            CalibrationError: no parameter of the block, or several, have that shape.
        """
        mine = {id(parameter) for parameter in self.module.parameters()}
        shape = (self.num_experts, hidden_size)
        found = [p for p in self.block.parameters() if p.shape == shape and id(p) not in mine]
        if len(found) != 1:
            raise CalibrationError(
                f"{self.name}: {len(found)} matrices of shape {shape} beside the experts; "
                "expected one, the router's"
            )
        return found[0]

    def damaged(self) -> str:
        """The block's first parameter with NaN or infinite values, empty if there is none."""
        block = self.name.rpartition(".")[0]
        for name, parameter in self.block.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f"{block}.{name}"
        return ""


class FusedExperts(Experts):
    """Experts in one module, with parameters of shape ``[N, ...]``."""

    def run(self, expert: int, hidden: Tensor) -> Tensor:
        ids = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
        weights = torch.ones_like(ids, dtype=hidden.dtype)
        output: Tensor = self.module.forward(hidden, ids, weights)  # past the hooks of `watch`
        return output

    @contextmanager
    def watch(self) -> Iterator[list[Routing]]:
        signature = inspect.signature(self.module.forward)
        seen: list[Routing] = []

        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            hidden, ids, weights = signature.bind(*args, **kwargs).args[:NUM_ARGUMENTS]
            seen.append(Routing(hidden, ids.long(), weights, output))

        with self.module.register_forward_hook(record, with_kwargs=True):
            yield seen


class ExpertList(Experts):
    """Experts as a list of modules inside a block that routes by itself.

    The block is linear in what its experts return. So its combine weights are read off by making
    expert u return the u-th unit vector, and what else it adds (shared experts) by making all of
    them return zero. That takes N <= hidden.
    """

    def run(self, expert: int, hidden: Tensor) -> Tensor:
        output: Tensor = self.module[expert].forward(hidden)  # type: ignore[index]
        return output

    @contextmanager
    def watch(self) -> Iterator[list[Routing]]:
        seen: list[Routing] = []

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            if self.num_experts > hidden.shape[-1]:
                raise CalibrationError(
                    f"{self.name}: {self.num_experts} experts in a list, but a hidden size of "
                    f"{hidden.shape[-1]}: their weights cannot be told apart"
                )

            def rerun(answer: Callable[[int, Tensor], Tensor]) -> Tensor:
                with self._answering(answer):
                    return _first(module.forward(*args, **kwargs)).flatten(0, -2)

            rest = rerun(lambda expert, output: torch.zeros_like(output))
            weights = (rerun(_unit_vector) - rest)[:, : self.num_experts]
            top_k = int((weights != 0).sum(dim=1).max())
            topk_weights, topk_ids = weights.topk(top_k, dim=1)
            combined = _first(output).flatten(0, -2) - rest
            seen.append(Routing(hidden.flatten(0, -2), topk_ids, topk_weights, combined))

        with self.block.register_forward_hook(record, with_kwargs=True):
            yield seen

    @contextmanager
    def _answering(self, answer: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        def replace(expert: int) -> Callable[..., Tensor]:
            return lambda module, args, output: answer(expert, output)

        with ExitStack() as hooks:
            for i, expert in enumerate(self.module.children()):
                hooks.enter_context(expert.register_forward_hook(replace(i)))
            yield


def _unit_vector(expert: int, output: Tensor) -> Tensor:
    vector = torch.zeros_like(output)
    vector[..., expert] = 1
    return vector


def _first(output: Any) -> Tensor:
    """A block may return its router logits too."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def find_moe_layers(model: nn.Module) -> tuple[str, dict[int, Experts]]:
    """Where the decoder layers are, and the MoE layers among them by layer id.

    Returns:
        The name of the ``nn.ModuleList`` of decoder layers, such as ``model.layers``, and the
        routed experts by layer id, in order.

    Raises:
        CalibrationError: there are no experts, or they are of a structure that is not known.
    """
    found, rejected = _search(model)
    kind = type(model).__name__
    if not found:
        what = "; ".join(rejected) or "no module with several experts: a dense model"
        raise CalibrationError(f"{kind}: no MoE layer whose experts can be run one by one: {what}")
    if rejected:
        raise CalibrationError(
            f"{kind}: some experts are of an unknown structure: {'; '.join(rejected)}; "
            f"beside {len(found)} known ones such as {next(iter(found))}"
        )
    stacks = {name: _stack_of(model, name) for name in found}
    if len({stack for stack, _ in stacks.values()}) != 1 or "" in dict(stacks.values()):
        raise CalibrationError(f"{kind}: experts lie outside one stack of layers: {list(stacks)}")
    layers: dict[int, Experts] = {}
    for name, experts in found.items():
        _, layer = stacks[name]
        if layer in layers:
            raise CalibrationError(
                f"{kind}: layer {layer} has two sets of experts: {layers[layer].name}, {name}"
            )
        layers[layer] = experts
    sizes = {experts.num_experts for experts in layers.values()}
    if len(sizes) != 1:
        raise CalibrationError(f"{kind}: layers differ in their number of experts: {sorted(sizes)}")
    return next(iter(stacks.values()))[0], dict(sorted(layers.items()))


def _search(model: nn.Module) -> tuple[dict[str, Experts], list[str]]:
    """Experts by the name of their module, and what else looks like experts, described."""
    found: dict[str, Experts] = {}
    rejected: list[str] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        block = modules[name.rpartition(".")[0]]
        if name.rpartition(".")[2] != "experts":
            if _num_stacked(module) > 1:
                rejected.append(f"{name}: {_describe(module)}, not named 'experts'")
        elif isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1:
            found[name] = ExpertList(name, module, block, len(module))
        elif _num_stacked(module) > 1 and _takes_routing(module):
            found[name] = FusedExperts(name, module, block, _num_stacked(module))
        else:
            rejected.append(f"{name}: {_describe(module)}")
    return found, rejected


def _num_stacked(module: nn.Module) -> int:
    """N where all matrices of the module are stacked along a first dimension N, else 0."""
    sizes = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
    return sizes.pop() if len(sizes) == 1 else 0


def _takes_routing(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == NUM_ARGUMENTS


def _describe(module: nn.Module) -> str:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return f"{type(module).__name__}{inspect.signature(module.forward)} with {shapes}"


def _stack_of(model: nn.Module, name: str) -> tuple[str, int]:
    """The outermost ``nn.ModuleList`` around a module, and the place in it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if (
            isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList)
            and parts[i].isdecimal()
        ):
            return ".".join(parts[:i]), int(parts[i])
    return "", 0
