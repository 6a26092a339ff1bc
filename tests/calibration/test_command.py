"""``calibrate`` as a command: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import METRICS, load_artifact
from sglang_moe_routing.calibration.metrics import METRICS as COMPUTED
from sglang_moe_routing.cli.app import app

Tiny = Callable[[str], Path]
TEXT = str(demo.MODEL.parent / "heldout.txt")
SMALL = ("--num-sequences", "6", "--seq-len", "16", "--batch-size", "4")


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr in one line."""
    done = CliRunner().invoke(app, ["calibrate", *map(str, arguments)])
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_written_and_described(tiny: Tiny, tmp_path: Path, metric: str) -> None:
    out = tmp_path / "new" / f"{metric}.safetensors"
    text = ["--data", TEXT, *SMALL] if COMPUTED[metric].needs_tokens else []
    status, stdout, _ = run(tiny("olmoe"), "--out", out, "--metric", metric, *text, "--json")
    assert status == 0
    summary, artifact = json.loads(stdout), load_artifact(out)
    assert summary["file"] == str(out)
    assert (summary["metric"], summary["model"]) == (metric, "olmoe")
    assert summary["layers"] == artifact.layers == [0, 1, 2]
    assert summary["details"] == artifact.details
    assert set(summary["seconds"]) == {"0", "1", "2"}
    assert sorted(artifact.coefficients) == (
        artifact.layers if METRICS[metric].has_coefficients else []
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_table_names_layers_and_unused_experts(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "similarity.safetensors"
    few = ("--num-sequences", 1, "--seq-len", 2)
    status, stdout, _ = run(tiny("olmoe"), "--out", out, "--metric", "routed", "--data", TEXT, *few)
    assert status == 0
    assert "layer 0: no token came to experts [" in stdout
    assert "routed, 3 layers of 16 experts" in stdout


def test_data_may_be_given_several_times(tiny: Tiny, tmp_path: Path) -> None:
    out, more = tmp_path / "similarity.safetensors", tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"body": "some words of text " * 9}) + "\n" for _ in "abc"))
    data = ("--data", TEXT, "--data", more, "--text-column", "body", *SMALL)
    assert run(tiny("olmoe"), "--out", out, *data)[0] == 0
    assert load_artifact(out).details["text"]["sources"] == ["heldout.txt", "more.jsonl"]


def test_an_artifact_is_not_replaced_unasked(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "similarity.safetensors"
    arguments = (tiny("olmoe"), "--out", out, "--metric", "weights")
    assert run(*arguments)[0] == 0
    before = out.read_bytes()
    status, _, stderr = run(*arguments)
    assert (status, out.read_bytes()) == (1, before)
    assert "is there already; add --overwrite" in stderr
    assert run(*arguments, "--overwrite")[0] == 0


def test_model_folders_are_kept_clean(tiny: Tiny, tmp_path: Path) -> None:
    """SGLang loads every safetensors file of a model's folder."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("olmoe"), folder)
    status, _, stderr = run(folder, "--out", folder / "similarity.safetensors", "--data", TEXT)
    assert status == 1
    assert "is a model folder" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--metric routed needs calibration text: add --data"),
        (
            ["--metric", "weights", "--data", TEXT],
            "--metric weights uses no text: leave out --data",
        ),
        (["--data", TEXT, "--layers", "x"], "--layers 'x': no layer ids and ranges"),
        (["--data", TEXT, "--layers", "0,9", *SMALL], "layer 9 of olmoe has no routed experts"),
        (["--data", TEXT, "--device", "cuda:77"], "--device cuda:77: cannot be used"),
        (["--data", TEXT, "--device", "gpu"], "--device gpu: cannot be used"),
        (["--data", "no.txt"], "no.txt: no such file"),
        (["--data", TEXT, "--num-sequences", "9999"], "heldout.txt: holds"),
    ],
)
def test_mistakes_are_named_in_one_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    out = tmp_path / "out" / "similarity.safetensors"
    status, _, stderr = run(tiny("olmoe"), "--out", out, *options)
    assert status == 1
    assert stderr.startswith("error: ")
    assert message in stderr
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


def test_places_that_cannot_be_written_are_named_before_the_work(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "similarity.safetensors"
    status, _, stderr = run(tiny("olmoe"), "--out", out, "--metric", "weights")
    assert status == 1
    assert "cannot be written" in stderr
    status, _, stderr = run(tiny("olmoe"), "--out", tmp_path, "--metric", "weights")
    assert status == 1
    assert "a folder; name a file" in stderr
