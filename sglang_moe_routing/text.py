"""Text to calibrate or evaluate on: equally long sequences, in equal parts from every source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TextError

LOADERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class TokenizedText:
    """What a model is calibrated or evaluated on.

    Attributes:
        token_ids: int64 ``[num_sequences, sequence_length]``.
        sources: what was asked for, in that order.
        seed: of the choice of sequences.
    """

    token_ids: Tensor
    sources: tuple[str, ...]
    seed: int

    @property
    def sha256(self) -> str:
        """Digest of the token ids."""
        return hashlib.sha256(self.token_ids.numpy().tobytes()).hexdigest()


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        TextError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise TextError(f"{folder}: no usable tokenizer: {error}") from None


def read_text(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    num_sequences: int = 400,
    sequence_length: int = 128,
    seed: int = 0,
    column: str = "text",
) -> TokenizedText:
    """Tokenise sources and draw sequences from them.

    A text file is cut into sequences, of which some are drawn. Documents (of a JSONL or Parquet
    file or a data set) come in shuffled order, are joined by the tokenizer's end-of-text token, and
    cut until there are enough sequences; what follows is not read.

    Args:
        sources: text, JSONL or Parquet files, or data sets of the Hugging Face hub as
            ``NAME[:CONFIGURATION][@SPLIT]``, read as a stream.
        tokenizer: of the model.
        column: which column of a table holds the text.

    Raises:
        TextError: a source cannot be read or is too short; the message says by how much.
    """
    share, more = divmod(num_sequences, len(sources))
    if share == 0:
        raise TextError(f"{num_sequences} sequences from {len(sources)} sources: give more")
    rows: list[Tensor] = []
    for i, source in enumerate(sources):
        wanted = share + (i < more)
        found = _sequences(source, tokenizer, wanted, sequence_length, seed, column)
        if len(found) < wanted:
            raise TextError(
                f"{source}: holds {len(found)} sequences of {sequence_length} tokens, {wanted} are "
                "needed; give more text, or ask for fewer or shorter sequences"
            )
        rows.append(found)
    return TokenizedText(torch.cat(rows), tuple(sources), seed)


def _sequences(
    source: str, tokenizer: Any, wanted: int, length: int, seed: int, column: str
) -> Tensor:
    """Up to `wanted` sequences: int64 ``[n, length]``."""
    path = Path(source).expanduser()
    if not path.is_file() and (path.exists() or _is_meant_as_file(source, path)):
        raise TextError(f"{source}: no such file")
    if path.is_file() and path.suffix.lower() not in LOADERS:
        return _draw(_cut(_encode(tokenizer, [_read(path)]), length), wanted, seed)
    documents = _documents(source, path, seed, column)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _cut(_encode(tokenizer, documents, ends, enough=wanted * length), length)[:wanted]


def _is_meant_as_file(source: str, path: Path) -> bool:
    """Asking the hub for it would take half a minute to fail on a machine without network."""
    has_suffix = path.suffix.lower() in {".txt", ".md", *LOADERS}
    return has_suffix or source.count("/") > 1 or source.startswith((".", "/", "~"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text: {error.reason} at {error.start}") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None


def _encode(
    tokenizer: Any, documents: Iterable[str], ends: Sequence[int] = (), enough: int | None = None
) -> list[int]:
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += ends
        if enough is not None and len(ids) >= enough:
            break
    return ids


def _cut(ids: Sequence[int], length: int) -> Tensor:
    whole = len(ids) // length
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)


def _draw(rows: Tensor, wanted: int, seed: int) -> Tensor:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:wanted]]


def _documents(source: str, path: Path, seed: int, column: str) -> Iterator[str]:
    """Texts in an order that the seed decides."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            loader = LOADERS[path.suffix.lower()]
            table = datasets.load_dataset(loader, data_files=str(path), split="train")
            rows: Any = table.shuffle(seed=seed)
        else:
            name, _, split = source.partition("@")
            name, _, configuration = name.partition(":")
            stream = datasets.load_dataset(
                name, configuration or None, split=split or "train", streaming=True
            )
            rows = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in rows:
            yield _text_of(row, column, source)
    except TextError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        hint = "" if path.is_file() else " (neither a file nor a data set that can be reached)"
        raise TextError(f"{source}: cannot be read{hint}: {reason}") from error


def _text_of(row: dict[str, Any], column: str, source: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        columns = ", ".join(islice(row, 12))
        raise TextError(
            f"{source}: column {column!r} holds no text; columns: {columns} (see --text-column)"
        )
    return text
