"""Tiny models of every family, and texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.models import make_tiny_models
from sglang_moe_routing.calibration.calibrate import Calibration
from sglang_moe_routing.calibration.metrics import METRICS
from sglang_moe_routing.calibration.streaming import StreamedModel
from sglang_moe_routing.text import TokenizedText

VOCABULARY = 1024


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a tiny float32 checkpoint of a family, once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("tiny") / family
            made[family] = make_tiny_models.make(family, folder)
        return made[family]

    return make


def random_text(num_sequences: int = 5, length: int = 24, seed: int = 0) -> TokenizedText:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (num_sequences, length), generator=generator)
    return TokenizedText(ids, ("random",), seed)


def calibration(
    folder: Path,
    out: Path,
    metric: str = "frobenius",
    text: TokenizedText | None = None,
    *,
    device: str = "cpu",
    **options: Any,
) -> Calibration:
    """A run of two batches a layer, the second one smaller."""
    needs_text = METRICS[metric].needs_tokens
    return Calibration(
        StreamedModel(str(folder), dtype="float32", device=device),
        name=folder.name,
        metric=metric,
        out=out,
        text=(text or random_text()) if needs_text else None,
        batch_size=3,
        **options,
    )
