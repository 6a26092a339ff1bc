"""The bundled demo: a small trained MoE model, its similarity artifact, prompts and policies."""

from pathlib import Path

_FOLDER = Path(__file__).parent
MODEL = _FOLDER / "model"
CONFIG = _FOLDER / "demo.yaml"
PROMPTS = _FOLDER / "prompts.txt"


def read_prompts() -> list[str]:
    """Prompts in the style of the model's training text, one a line."""
    return [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
