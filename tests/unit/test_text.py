"""Calibration text: what is drawn from files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from sglang_moe_routing.errors import TextError
from sglang_moe_routing.text import TokenizedText, read_text

LENGTH = 8


class Letters:
    """A tokenizer of one token per character."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) for character in text]}


def read(sources: list[Path | str], num_sequences: int = 4, **options: Any) -> TokenizedText:
    names = [str(source) for source in sources]
    return read_text(
        names, Letters(), num_sequences=num_sequences, sequence_length=LENGTH, **options
    )


def texts(text: TokenizedText) -> list[str]:
    return ["".join(map(chr, row)) for row in text.token_ids.tolist()]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(20 * LENGTH + 5)))
    return path


def test_a_text_file_is_cut_and_drawn_from(prose: Path) -> None:
    """Different places of the text, none twice, the same for the same seed."""
    first, again, other = read([prose]), read([prose]), read([prose], seed=1)
    whole = prose.read_text()
    cuts = [whole[i : i + LENGTH] for i in range(0, 20 * LENGTH, LENGTH)]
    assert first.token_ids.shape == (4, LENGTH)
    assert set(texts(first)) <= set(cuts)
    assert len({cuts.index(t) for t in texts(first)}) == 4
    assert torch.equal(first.token_ids, again.token_ids)
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_are_joined_and_cut(tmp_path: Path, suffix: str) -> None:
    """In an order that the seed decides, with the end-of-text token between them."""
    documents = [letter * 5 for letter in "abcdefghij"]
    path = tmp_path / f"documents{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        pandas.DataFrame({"text": documents}).to_parquet(path)
    joined = "".join(texts(read([path])))
    pieces = joined.split("\0")
    assert all(piece in documents for piece in pieces[:-1])
    assert len(set(pieces[:-1])) == len(pieces) - 1
    assert texts(read([path])) == texts(read([path]))
    assert {joined} != {"".join(texts(read([path], seed=seed))) for seed in range(1, 6)}


def test_every_source_gives_an_equal_part(tmp_path: Path) -> None:
    """The first sources give one more where it does not come out even."""
    paths = []
    for letter in "abc":
        paths.append(tmp_path / f"{letter}.txt")
        paths[-1].write_text(letter * 100)
    rows = texts(read(paths, num_sequences=7))
    assert [row[0] for row in rows] == list("aaabbcc")


def test_another_column_may_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"id": 1, "body": "x" * 100}) + "\n")
    assert texts(read([path], column="body")) == ["x" * LENGTH] * 4
    with pytest.raises(TextError, match=r"column 'text' holds no text; columns: id, body"):
        read([path])


def test_too_little_text_says_how_much_there_is(prose: Path) -> None:
    with pytest.raises(TextError, match=r"prose\.txt: holds 20 sequences of 8 .* 21 are"):
        read([prose], num_sequences=21)
    prose.write_text("")
    with pytest.raises(TextError, match=r"holds 0 sequences"):
        read([prose])


def test_fewer_sequences_than_sources_are_refused(prose: Path) -> None:
    with pytest.raises(TextError, match="1 sequences from 2 sources"):
        read([prose, prose], num_sequences=1)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "text.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match=r"text\.txt: not UTF-8"):
        read([binary])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"\n{{{')
    with pytest.raises(TextError, match=r"broken\.jsonl: cannot be read"):
        read([broken])


@pytest.mark.parametrize("name", ["no.txt", "no.JSONL", "./no", "a/b/c", "~/no"])
def test_a_file_that_is_not_there_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(TextError, match=f"{name}: no such file"):
        read([name])


def test_a_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file"):
        read([tmp_path])


def test_a_name_that_is_neither_file_nor_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match="neither a file nor a data set that can be reached"):
        read(["nobody/no-such-data"])
