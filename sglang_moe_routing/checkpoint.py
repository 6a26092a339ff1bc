"""Safetensors checkpoints: where they lie, what they hold, and a fingerprint to know them by."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_NUM_SAMPLES = 1024
_SAMPLE_BYTES = 4096
_LAYER = re.compile(
    r"(?P<stack>(?:.*?\.)?layers)\.(?P<number>\d+)\.(?P<experts>(?:.*\.)?experts\.)?"
)


@dataclass(frozen=True)
class Fingerprint:
    """Digests that tell checkpoints apart.

    Attributes:
        structure: of the names, dtypes and shapes of all tensors. A fine-tune keeps it.
        weights: of 4 KiB of each of up to 1,024 tensors, evenly spread. Enough to notice another
            training run, not a change to a few single values.
    """

    structure: str
    weights: str


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; the bytes ``[start, stop)`` of `file` are its values."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def find_checkpoint(model: str, *, revision: str | None = None, cache: str | None = None) -> Path:
    """Folder of a local checkpoint, or of one that Hugging Face's cache holds already.

    Raises:
        CheckpointError: neither is there.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") > 1 or model.startswith((".", "~")):
        raise CheckpointError(f"{model}: not a folder; a checkpoint is a folder with {SINGLE}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"{model}: no such folder, and no such model in the Hugging Face cache; "
            f"fetch it first with: hf download {model}"
        ) from None


def read_headers(folder: Path) -> Mapping[str, StoredTensor]:
    """What the checkpoint in `folder` holds, by name, sorted; no tensor is read.

    Raises:
        CheckpointError: there is no safetensors checkpoint, or a file is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        tensors.update(_read_header(file))
    return dict(sorted(tensors.items()))


def fingerprint(tensors: Mapping[str, StoredTensor]) -> Fingerprint:
    """Fingerprint of a checkpoint, in a few thousand small reads whatever its size."""
    names = sorted(tensors)
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name in names:
        structure.update(json.dumps([name, tensors[name].dtype, tensors[name].shape]).encode())
    step = max(1, -(-len(names) // _NUM_SAMPLES))
    for name in names[::step]:
        weights.update(name.encode() + b"\0" + _sample(tensors[name]))
    return Fingerprint(structure.hexdigest(), weights.hexdigest())


def moe_layers(names: Iterable[str]) -> list[int]:
    """Ids of the layers for which a checkpoint's tensors include routed experts."""
    found = (_LAYER.match(name) for name in names)
    return sorted({int(layer["number"]) for layer in found if layer and layer["experts"]})


def layers_without_experts(names: Iterable[str], layers: Iterable[int]) -> list[int]:
    """Those of `layers` that a checkpoint holds, but without experts where other layers have them.

    Layers of one stack are compared, for instance of `model.layers` and not of `mtp.layers`; a
    checkpoint that calls no tensor `experts` has none to compare.

    Args:
        names: of the checkpoint's tensors.
        layers: numbers of the layers that should have experts.
    """
    present, routed = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for name in names:
        if found := _LAYER.match(name):
            present[found["stack"]].add(int(found["number"]))
            if found["experts"]:
                routed[found["stack"]].add(int(found["number"]))
    dense = set().union(*(present[stack] - numbers for stack, numbers in routed.items()))
    return sorted(dense.intersection(layers).difference(*routed.values()))


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise CheckpointError(f"{folder}: no safetensors checkpoint: neither {SINGLE} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: not an index of safetensors files") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: names {missing[0]}, which is not there")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        start = 8 + size
        tensors = {
            name: _stored(file, entry, start)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from None
    end, length = max((t.stop for t in tensors.values()), default=start), file.stat().st_size
    if length < end:
        raise CheckpointError(f"{file}: truncated: {length} bytes, its header says {end}")
    return tensors


def _stored(file: Path, entry: Mapping[str, Any], start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + first, start + last)


def _sample(tensor: StoredTensor) -> bytes:
    """Bytes from the middle: the beginning may belong to rarely used rows."""
    size = min(tensor.stop - tensor.start, _SAMPLE_BYTES)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + (tensor.stop - tensor.start - size) // 2)
        return stream.read(size)
