"""Run a model that need not fit into memory, one decoder layer at a time.

The skeleton of the model lies on torch's meta device, without memory. To run layer i on hidden
states that an earlier step left, the model's own ``forward`` is called while every other layer
hands its input on. So masks, rotary embeddings and whatever else a layer is given are the model's
own, and no modelling code is copied. Only layer i's weights are in memory meanwhile, besides what
lies outside the layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint import Fingerprint, StoredTensor, find_checkpoint, fingerprint, read_headers
from ..errors import CalibrationError
from .experts import find_moe_layers


class _LayerReached(Exception):  # noqa: N818 - ends a forward early, nothing is wrong
    pass


class StreamedModel:
    """A transformers causal language model of which one layer at a time is in memory.

    Attributes:
        moe_layers: the routed experts by layer id.
        architecture: name of the model's class.
        dtype: of weights and hidden states.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ):
        """Read the configuration; weights are read when they are needed.

        Args:
            model: folder of a safetensors checkpoint, or the name of one in Hugging Face's cache.
            dtype: a torch dtype's name; "auto" is the checkpoint's own.

        Raises:
            CheckpointError: there is no such checkpoint.
            CalibrationError: transformers does not know the model, it is quantised, it has no
                experts, or they are of an unknown structure.
        """
        self.folder = find_checkpoint(model)
        self.device = torch.device(device)
        self._stored = read_headers(self.folder)
        self._model = _skeleton(self.folder, dtype, trust_remote_code)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self.dtype: torch.dtype = self._model.dtype
        self.architecture = type(self._model).__name__
        self._stack, self.moe_layers = find_moe_layers(self._model)
        layers = cast(nn.ModuleList, self._model.get_submodule(self._stack))
        self._layers: Sequence[nn.Module] = list(layers)
        self._returns_tuple = False
        self._load_outside()

    @property
    def hidden_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    def fingerprint(self) -> Fingerprint:
        """Of the weights."""
        return fingerprint(self._stored)

    def embed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The first layer's input: token ids ``[batch, tokens]`` -> ``[batch, tokens, hidden]``."""
        embeddings = self._model.get_input_embeddings()
        name = next(n for n, m in self._model.named_modules() if m is embeddings)
        self._load(key for key in self._stored if _is_inside(key, name))
        try:
            for ids in batches:
                with self._capture_input() as captured:
                    self._forward(0, input_ids=ids.to(self.device))
                yield captured[0].cpu()
        finally:
            _unload(embeddings)

    @contextmanager
    def loaded(self, layer: int) -> Iterator[None]:
        """Keep the weights of one decoder layer in memory."""
        pattern = f"{self._stack.rpartition('.')[2]}.{layer}"
        try:
            absent = self._load(key for key in self._stored if f".{pattern}." in f".{key}")
            missing = sorted(key for key in absent if key.startswith(f"{self._stack}.{layer}."))
            if missing:
                raise CalibrationError(
                    f"{self.folder}: no weights for {missing[0]} "
                    f"({len(missing)} tensors of layer {layer} in all)"
                )
            yield
        finally:
            _unload(self._layers[layer])

    def run_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """Output of a layer that is `loaded`: ``[batch, tokens, hidden]`` -> the same shape."""
        hidden = hidden.to(self.device)
        outputs: list[Any] = []

        def substitute(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": hidden})
            )

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise _LayerReached

        with (
            self._layers[layer].register_forward_pre_hook(substitute, with_kwargs=True),
            self._layers[layer].register_forward_hook(stop),
        ):
            self._forward(layer, inputs_embeds=hidden)
        self._returns_tuple = isinstance(outputs[0], tuple)
        result: Tensor = outputs[0][0] if self._returns_tuple else outputs[0]
        return result.cpu()

    @torch.no_grad()
    def _forward(self, layer: int, **inputs: Tensor) -> None:
        """Run the model up to `layer`; those before it hand their input on."""
        with self._skipping(self._layers[:layer]):
            try:
                self._model(**inputs, use_cache=False)
            except _LayerReached:
                return
        raise CalibrationError(f"{self.architecture} did not run its layer {layer}")

    @contextmanager
    def _capture_input(self) -> Iterator[list[Tensor]]:
        captured: list[Tensor] = []

        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            captured.append(args[0] if args else kwargs["hidden_states"])
            raise _LayerReached

        with self._layers[0].register_forward_pre_hook(record, with_kwargs=True):
            yield captured

    @contextmanager
    def _skipping(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self._returns_tuple else hidden_states

        for layer in layers:
            layer.forward = hand_on
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own again

    def _load_outside(self) -> None:
        """Load what lies outside the layers, but for the large matrices of the vocabulary."""
        outer = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        skipped = [n for n, m in self._model.named_modules() if any(m is o for o in outer)]
        inside = f".{self._stack.rpartition('.')[2]}."
        self._load(
            key
            for key in self._stored
            if inside not in f".{key}" and not any(_is_inside(key, name) for name in skipped)
        )

    def _load(self, keys: Iterable[str]) -> set[str]:
        """Load tensors of the checkpoint into the skeleton, renamed and fused as transformers does.

        One converted parameter at a time: its parts in the checkpoint, then the stacked whole.

        Returns:
            Names of all parameters and buffers of the model that this did not load.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self._model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            weight_mapping=get_model_conversion_mapping(self._model),
        )
        with _open_slices(self._stored, keys) as slices, _one_by_one():
            found, _ = convert_and_load_state_dict_in_model(self._model, slices, config)
        if found.mismatched_keys:
            name, stored, expected = sorted(found.mismatched_keys)[0]
            raise CalibrationError(
                f"{self.folder}: {name} has shape {tuple(stored)}, "
                f"config.json says {tuple(expected)}"
            )
        if found.conversion_errors:
            raise CalibrationError(f"{self.folder}: {next(iter(found.conversion_errors.values()))}")
        return set(found.missing_keys)


def _skeleton(folder: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The model with parameters that take no memory, and with its real buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise CalibrationError(
                f"{folder}: quantised weights ({config.quantization_config.get('quant_method')}) "
                "cannot be calibrated; use the unquantised checkpoint of the same model"
            )
        wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=wanted,
                experts_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{folder}: transformers cannot make this model: {error}") from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have shapes, but no values. Buffers, such as rotary tables, do."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _open_slices(
    stored: Mapping[str, StoredTensor], keys: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Tensors of the checkpoint by name, read when they are indexed. By pread: the pages of a
    mapped file would count as this process's memory."""
    files: dict[Path, Any] = {}
    slices = {}
    with ExitStack() as stack:
        for key in keys:
            file = stored[key].file
            if file not in files:
                opened = safe_open(str(file), framework="pt", backend="pread")
                files[file] = stack.enter_context(opened)
            slices[key] = files[file].get_slice(key)
        yield slices


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Make transformers read the parts of one parameter at a time, not all at once in threads."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one for the whole run
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _unload(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _is_inside(key: str, name: str) -> bool:
    """Whether a checkpoint's key belongs to a module; either may lack the base model's prefix."""
    module = name.rpartition(".")[2]
    return key == f"{module}.weight" or key.endswith(f".{module}.weight")
