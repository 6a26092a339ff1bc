"""`inspect`: numbers against brute force and scipy, pictures, the command and its refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import METRICS, SimilarityArtifact, save_artifact
from sglang_moe_routing.calibration import heatmap
from sglang_moe_routing.calibration.statistics import (
    Comparison,
    Hub,
    Isolated,
    compare,
    layer_agreement,
    layer_statistics,
    nearest_experts,
    rank_correlation,
    spans,
)
from sglang_moe_routing.cli import app, output
from sglang_moe_routing.errors import ArtifactError
from sglang_moe_routing.policies import SERE, FreeSlots, build_table, reroute

ARTIFACT = demo.CONFIG.parent / "similarity.safetensors"
RUNNER = CliRunner()

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)

ROUTED = torch.tensor(
    [
        [1.0, 0.5, 0.5, -2.0],
        [0.25, 1.0, 0.75, 0.0],
        [0.0, 0.75, 1.0, -1.0],
        [-4.0, -3.0, -3.5, 1.0],
    ]
)


def symmetric(size: int, seed: int = 0) -> Tensor:
    half = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def artifact(
    matrices: dict[int, Tensor], metric: str = "cosine", **more: Any
) -> SimilarityArtifact:
    if METRICS[metric].has_coefficients:
        more = {"coefficients": matrices, **more}
    return SimilarityArtifact(matrices=matrices, metric=metric, **{"model": "tiny", **more})


def written(path: Path, matrices: dict[int, Tensor], metric: str = "cosine", **more: Any) -> Path:
    save_artifact(artifact(matrices, metric, **more), path)
    return path


def invoke(*arguments: object) -> Result:
    return RUNNER.invoke(app, ["inspect", *map(str, arguments)])


def shown(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: object) -> str:
    """The one line of a refusal."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# --- one layer ---------------------------------------------------------------------------------


def test_the_numbers_of_a_layer_are_those_worked_out_by_hand() -> None:
    found = layer_statistics(3, ROUTED, [-3.0, 0.5, 0.75, 1.0])
    assert found.layer == 3
    assert found.mean == pytest.approx(-10.75 / 12)
    assert found.quantiles["min"] == -4.0
    assert found.quantiles["median"] == 0.0
    assert found.quantiles["max"] == 0.75
    assert found.nearest_mean == pytest.approx((0.5 + 0.75 + 0.75 - 3.0) / 4)
    assert found.share_without_neighbour == {-3.0: 0.0, 0.5: 0.25, 0.75: 0.5, 1.0: 1.0}
    assert found.most_isolated == [
        Isolated(3, 1, -3.0),
        Isolated(0, 1, 0.5),
        Isolated(1, 2, 0.75),
        Isolated(2, 1, 0.75),
    ]
    assert found.distinct_neighbours == 2
    assert found.largest_hub == Hub(1, 3)


def test_the_numbers_of_coefficients_are_those_worked_out_by_hand() -> None:
    """Nearest is who is most similar, not who has the largest coefficient."""
    coefficients = torch.tensor(
        [
            [1.0, 0.5, 0.0, 1.0],
            [0.0, 1.0, 0.25, 0.5],
            [0.0, 0.75, 1.0, 0.0],
            [1.0, 0.0, 0.0, 1.0],
        ]
    )
    found = layer_statistics(3, ROUTED, [], coefficients).coefficients
    assert found is not None
    assert found.mean == pytest.approx(4 / 12)
    assert found.quantiles["min"] == 0.0
    assert found.quantiles["median"] == pytest.approx(0.125)
    assert found.quantiles["max"] == 1.0
    assert found.nearest_mean == pytest.approx((0.5 + 0.25 + 0.75 + 0.0) / 4)
    assert layer_statistics(3, ROUTED, []).coefficients is None


def test_ties_go_to_the_lowest_id() -> None:
    found = layer_statistics(0, torch.ones(6, 6), [1.0])
    assert [(one.expert, one.nearest) for one in found.most_isolated] == [
        (0, 1),
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
    ]
    assert found.largest_hub == Hub(0, 5)
    assert found.share_without_neighbour == {1.0: 0.0}


def test_the_diagonal_counts_nowhere() -> None:
    found = layer_statistics(0, torch.eye(4), [0.0, 0.5])
    assert (found.mean, found.quantiles["max"], found.nearest_mean) == (0.0, 0.0, 0.0)
    assert found.share_without_neighbour == {0.0: 0.0, 0.5: 1.0}
    assert all(one.nearest != one.expert for one in found.most_isolated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_threshold_is_met_by_the_same_number_in_the_artifacts_dtype(dtype: torch.dtype) -> None:
    """As in the engine, which compares float32: 0.9 in float16 is less, in float32 it is equal."""
    matrix = torch.full((3, 3), 0.9).fill_diagonal_(1.0).to(dtype)
    share = layer_statistics(0, matrix, [0.9]).share_without_neighbour[0.9]
    assert share == (0.0 if dtype == torch.float32 else 1.0)


def test_shares_and_neighbours_are_those_of_the_sere_policy() -> None:
    """With every other expert loaded, SERE moves exactly the experts that have a neighbour."""
    count, rho = 16, 0.8
    matrix = symmetric(count)
    similar, nearest = nearest_experts(matrix)
    policy = SERE.model_validate({"num_primary": 1, "threshold": rho})
    table = build_table(
        [policy], layer=0, top_k=2, num_experts=count, similarity={"a": matrix}, artifacts=["a"]
    )
    moved = 0
    for expert in range(count):
        others = torch.tensor([other for other in range(count) if other != expert])
        ids = torch.stack((others, torch.full_like(others, expert)), dim=1)  # primary, secondary
        preference = torch.tensor([[2.0, 1.0]]).expand_as(ids)
        scores = torch.zeros(count - 1, count).scatter(1, ids, preference)
        weights, plan = torch.full(ids.shape, 0.5), torch.zeros(count - 1, dtype=torch.long)
        call = (scores, scores.softmax(1), ids, weights, plan, table)
        got = reroute(*call, renormalize=True, free_slots=FreeSlots.REPEAT_FIRST)
        is_replaced = bool(similar[expert] >= rho)
        assert set(got.topk_ids[:, 1].tolist()) == {int(nearest[expert]) if is_replaced else expert}
        moved += is_replaced
    share = layer_statistics(0, matrix, [rho]).share_without_neighbour[rho]
    assert 0 < moved < count
    assert share == 1 - moved / count


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_the_numbers_agree_with_plain_loops(count: int, seed: int) -> None:
    matrix = symmetric(count, seed)
    best = [max((float(matrix[u, v]), -v) for v in range(count) if v != u) for u in range(count)]
    nearest = [-v for _, v in best]
    found = layer_statistics(0, matrix, [0.5])
    worst = sorted(range(count), key=lambda u: best[u][0])[:5]
    assert [(one.expert, one.nearest) for one in found.most_isolated] == [
        (u, nearest[u]) for u in worst
    ]
    assert found.distinct_neighbours == len(set(nearest))
    hub = max(range(count), key=nearest.count)
    assert found.largest_hub == Hub(hub, nearest.count(hub))
    assert found.share_without_neighbour[0.5] == sum(value < 0.5 for value, _ in best) / count


def test_one_expert_is_refused() -> None:
    with pytest.raises(ArtifactError, match="1 expert per layer, expected at least 2"):
        layer_statistics(0, torch.ones(1, 1), [])


# --- two artifacts -----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    arrays.arrays("float32", (4, 7), elements=st.integers(-3, 3)),
    arrays.arrays("float32", (4, 7), elements=st.floats(-1e3, 1e3, width=16)),
)
def test_rank_correlation_is_that_of_scipy(here: Any, there: Any) -> None:
    """Ties get their mean rank; where scipy has no answer, a constant row, it is 0."""
    stats = pytest.importorskip("scipy.stats")
    found = rank_correlation(torch.from_numpy(here), torch.from_numpy(there))
    for row in range(4):
        constant = len(set(here[row])) == 1 or len(set(there[row])) == 1
        expected = 0.0 if constant else stats.spearmanr(here[row], there[row]).statistic
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)


def test_a_matrix_agrees_with_itself_and_with_any_growing_function_of_it() -> None:
    """Only ranks count, so the metric's scale does not matter."""
    matrix = symmetric(12)
    for other in (matrix, 1 - (1 - matrix).sqrt(), 5 * matrix - 4):
        found = layer_agreement(0, matrix, other)
        assert (found.argmax_agreement, found.top5_overlap) == (1.0, 1.0)
        assert found.rank_correlation == pytest.approx(1.0)
        assert found.rank_correlation_p05 == pytest.approx(1.0)


def test_a_reversed_matrix_disagrees() -> None:
    matrix = symmetric(12)
    found = layer_agreement(0, matrix, (1 - matrix).fill_diagonal_(1.0))
    assert found.argmax_agreement == 0.0
    assert found.rank_correlation == pytest.approx(-1.0)


def test_unrelated_matrices_agree_by_chance() -> None:
    """200 experts, so chance is 1 in 199; the tolerances are more than 3 standard deviations."""
    generator = torch.Generator().manual_seed(5)
    here, there = (torch.rand(200, 200, generator=generator).fill_diagonal_(1) for _ in range(2))
    found = compare(artifact({0: here}, "routed"), artifact({0: there}, "routed"))
    assert found.chance == 1 / 199
    assert found.mean["argmax_agreement"] == pytest.approx(found.chance, abs=0.016)
    assert found.mean["top5_overlap"] == pytest.approx(5 * found.chance, abs=0.016)
    assert found.mean["rank_correlation"] == pytest.approx(0, abs=0.016)
    assert found.mean["rank_correlation_p05"] == pytest.approx(-1.645 / 198**0.5, abs=0.04)


def test_the_overlap_counts_common_members_whatever_their_order() -> None:
    """Expert 0 has 1 to 5 nearest here and 3 to 7 there: 3 of 5."""
    here, there = torch.eye(8), torch.eye(8)
    here[0, 1:] = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.1])
    there[0, 1:] = torch.tensor([0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9])
    found = layer_agreement(0, here, there)
    assert found.top5_overlap == pytest.approx((3 / 5 + 7) / 8)
    assert found.argmax_agreement == 7 / 8


def test_layers_of_one_artifact_alone_are_named_and_means_are_over_the_common_ones() -> None:
    one, two, three = (symmetric(8, seed) for seed in range(3))
    found = compare(artifact({0: one, 1: one, 5: two}), artifact({1: one, 5: three, 9: one}))
    assert isinstance(found, Comparison)
    assert [each.layer for each in found.layers] == [1, 5]
    assert (found.only_here, found.only_there) == ([0], [9])
    for name, mean in found.mean.items():
        assert mean == pytest.approx(sum(asdict(each)[name] for each in found.layers) / 2)


def test_artifacts_that_have_nothing_in_common_are_refused() -> None:
    here = artifact({0: symmetric(8), 1: symmetric(8)})
    with pytest.raises(ArtifactError, match="6 experts, expected 8"):
        compare(here, artifact({0: symmetric(6)}))
    with pytest.raises(ArtifactError, match="has layers 4, none of the layers 0-1"):
        compare(here, artifact({4: symmetric(8)}))


@pytest.mark.parametrize(
    ("ids", "text"), [([0], "0"), ([0, 1, 2, 3, 7], "0-3,7"), ([1, 3, 4], "1,3-4"), ([], "")]
)
def test_layers_are_named_in_short(ids: list[int], text: str) -> None:
    assert spans(ids) == text


# --- pictures ----------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [2, 16, 128])
def test_a_heat_map_is_drawn_for_every_metric(tmp_path: Path, metric: str, count: int) -> None:
    file = tmp_path / "layer.png"
    heatmap.draw(artifact({0: symmetric(count).half()}, metric), 0, file)
    assert file.read_bytes()[:4] == b"\x89PNG"


@needs_matplotlib
@pytest.mark.filterwarnings("error")
def test_a_heat_map_takes_equal_values_and_any_name(tmp_path: Path) -> None:
    """A matrix of one value has no range; a model's name is no formula."""
    made = artifact({0: torch.ones(4, 4)}, model="/models/$\\frac$/" + "x" * 200)
    heatmap.draw(made, 0, tmp_path / "layer.png")


@needs_matplotlib
def test_a_heat_map_masks_the_diagonal_and_clips_only_unbounded_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    imshow = Axes.imshow

    def record(self: Axes, *args: Any, **options: Any) -> Any:
        drawn.append(imshow(self, *args, **options))
        return drawn[-1]

    monkeypatch.setattr(Axes, "imshow", record)
    matrix = symmetric(16)
    heatmap.draw(artifact({0: matrix}), 0, tmp_path / "bounded.png")
    matrix[3, 5] = -30.0
    heatmap.draw(artifact({0: matrix}, "routed"), 0, tmp_path / "unbounded.png")
    others = symmetric(16)[~torch.eye(16, dtype=torch.bool)]
    bounded, unbounded = drawn
    assert bounded.get_clim() == pytest.approx((float(others.min()), float(others.max())))
    assert unbounded.get_clim()[0] > 0
    assert bounded.get_array().mask.tolist() == torch.eye(16, dtype=torch.bool).tolist()
    assert torch.isfinite(torch.from_numpy(bounded.get_array().compressed())).all()


# --- the command -------------------------------------------------------------------------------


def test_the_command_describes_the_demos_artifact() -> None:
    found = shown(ARTIFACT, "--rho", "0,0.25")
    assert (found["metric"], found["model"]) == ("frobenius", "moe-routing-demo")
    assert (found["num_experts"], found["comparison"]) == (64, None)
    assert found["details"]["text"]["tokens"] == 51200
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    first = found["layers"][0]
    assert list(first["quantiles"]) == ["min", "p05", "median", "p95", "max"]
    assert list(first["share_without_neighbour"]) == ["0", "0.25"]
    assert set(first["most_isolated"][0]) == {"expert", "nearest", "similarity"}
    assert set(first["largest_hub"]) == {"expert", "count"}
    assert set(first) == {
        "layer",
        "mean",
        "quantiles",
        "nearest_mean",
        "share_without_neighbour",
        "most_isolated",
        "distinct_neighbours",
        "largest_hub",
        "coefficients",
    }
    assert first["coefficients"] is None
    assert "coefficient" not in invoke(ARTIFACT).stdout


def test_the_command_shows_coefficients_and_what_the_metric_means(tmp_path: Path) -> None:
    """Of the chosen layers; the fake coefficients are the similarities of another seed."""
    matrices = {layer: symmetric(8, layer) for layer in (0, 3)}
    coefficients = {layer: symmetric(8, 100 + layer) for layer in (0, 3)}
    file = written(tmp_path / "file", matrices, "least_squares", coefficients=coefficients)
    found = shown(file, "--layers", "3")
    assert found["meaning"] == METRICS["least_squares"].meaning
    (layer,) = found["layers"]
    expected = layer_statistics(3, coefficients[3], [])
    assert layer["coefficients"]["mean"] == expected.mean
    assert layer["coefficients"]["quantiles"] == expected.quantiles
    nearest = nearest_experts(matrices[3])[1]
    chosen = [float(coefficients[3][u, v]) for u, v in enumerate(nearest.tolist())]
    assert layer["coefficients"]["nearest_mean"] == pytest.approx(sum(chosen) / 8)
    text = " ".join(invoke(file).stdout.split())
    assert METRICS["least_squares"].meaning in text
    table = text.partition("coefficient of two different experts")[2]
    for values in (layer["coefficients"], shown(file)["layers"][0]["coefficients"]):
        assert f"{values['mean']:.3f} │ {values['quantiles']['min']:.3f}" in table
        assert f"{values['quantiles']['max']:.3f} │ {values['nearest_mean']:.3f}" in table


def test_the_command_compares_two_artifacts_of_two_metrics(tmp_path: Path) -> None:
    here = written(tmp_path / "here", {0: symmetric(8), 1: symmetric(8, 1), 2: symmetric(8)})
    there = written(tmp_path / "there", {1: symmetric(8, 1), 7: symmetric(8)}, "routed")
    comparison = shown(here, "--compare", there)["comparison"]
    layer = {
        "argmax_agreement": 1.0,
        "top5_overlap": 1.0,
        "rank_correlation": pytest.approx(1.0),
        "rank_correlation_p05": pytest.approx(1.0),
    }
    assert comparison == {
        "file": str(there),
        "metric": "routed",
        "model": "tiny",
        "chance": 1 / 7,
        "layers": [{"layer": 1, **layer}],
        "mean": layer,
        "only_here": [0, 2],
        "only_there": [7],
    }
    text = " ".join(invoke(here, "--compare", there).stdout.split())
    assert "14.3% same nearest" in text
    assert "values of two metrics are not comparable" in text
    assert f"only in {here}: layers 0,2" in text
    assert f"only in {there}: layers 7" in text


def test_layers_can_be_chosen_and_then_hold_for_both_files(tmp_path: Path) -> None:
    matrices = {layer: symmetric(8, layer) for layer in (0, 1, 2, 3, 7)}
    here = written(tmp_path / "here", matrices)
    there = written(tmp_path / "there", {**matrices, 9: symmetric(8)})
    found = shown(here, "--layers", "7, 0-1,1", "--compare", there)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 7]
    assert [layer["layer"] for layer in found["comparison"]["layers"]] == [0, 1, 7]
    assert (found["comparison"]["only_here"], found["comparison"]["only_there"]) == ([], [])


def test_tables_show_free_form_details_as_they_are(tmp_path: Path) -> None:
    """Details are other people's text: brackets are no markup, values need be no text."""
    details = {"text": "[bold]c4[/] \\", "nested": {"tokens": [1, None]}}
    file = written(tmp_path / "file", {0: symmetric(8)}, details=details)
    result = invoke(file)
    assert result.exit_code == 0
    assert "[bold]c4[/] \\" in result.stdout
    assert '{"tokens": [1, null]}' in result.stdout


def test_the_command_warns_of_hubs_and_only_of_them(tmp_path: Path) -> None:
    """The demo's metric is not normalised; a random matrix has no hubs."""
    assert "warning: layers 0-3: fewer than 25%" in invoke(ARTIFACT).stdout
    plain = written(tmp_path / "file", {0: symmetric(64)})
    assert "warning" not in invoke(plain).stdout


@needs_matplotlib
def test_plots_are_drawn_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "plots"
    file = written(tmp_path / "file", {0: symmetric(8), 11: symmetric(8)})
    shown(file, "--plots", folder)
    assert sorted(each.name for each in folder.iterdir()) == ["layer_0.png", "layer_11.png"]


# --- refusals ----------------------------------------------------------------------------------


def test_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    absent, foreign = tmp_path / "absent", tmp_path / "foreign"
    foreign.write_bytes(b"no tensors")
    for file in (absent, foreign):
        assert str(file) in refused(file)
        assert str(file) in refused(ARTIFACT, "--compare", file)
    save_file({"w": torch.ones(1)}, str(foreign))
    assert str(foreign) in refused(foreign)


@pytest.mark.parametrize("rho", ["", "x", "0.1;0.2", "0.1,,0.2", "nan", "0,inf", "[bold]"])
def test_thresholds_that_are_no_numbers_are_refused(rho: str) -> None:
    line = refused(ARTIFACT, "--rho", rho)
    assert f"--rho {rho!r}: expected finite numbers" in line


@pytest.mark.parametrize("layers", ["", "x", "3-1", "-1", "1.5", "0,,1", "1-", "9999999999999"])
def test_layers_that_are_no_list_are_refused(layers: str) -> None:
    assert f"--layers {layers!r}: " in refused(ARTIFACT, f"--layers={layers}")


@pytest.mark.parametrize(
    ("layers", "missing"), [("4", 4), ("0-99", 4), ("2,7-9", 7), ("0-9998", 4)]
)
def test_layers_that_the_file_does_not_have_are_refused(layers: str, missing: int) -> None:
    line = refused(ARTIFACT, "--layers", layers)
    assert line.endswith(f"--layers {layers!r}: {ARTIFACT} has no layer {missing}; it has 0-3")


def test_artifacts_that_cannot_be_compared_are_refused_by_name(tmp_path: Path) -> None:
    smaller = written(tmp_path / "smaller", {0: symmetric(8)})
    assert f"{smaller}: 8 experts, expected 64" in refused(ARTIFACT, "--compare", smaller)
    later = written(tmp_path / "later", {8: symmetric(64)})
    for more in ([], ["--layers", "0"]):
        assert f"{later}: has layers 8, none of" in refused(ARTIFACT, "--compare", later, *more)


def test_an_artifact_of_one_expert_is_refused_by_name(tmp_path: Path) -> None:
    file = written(tmp_path / "one", {0: torch.ones(1, 1)})
    assert f"{file}: has 1 expert per layer" in refused(file)


def test_plots_without_matplotlib_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    line = refused("absent", "--plots", tmp_path)
    assert "--plots draws with matplotlib" in line
    assert "pip install 'sglang-moe-routing[plot]'" in line


@needs_matplotlib
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for folder in (blocked, blocked / "below"):
        line = refused(ARTIFACT, "--plots", folder)
        assert f"{folder}: cannot write heat maps there" in line
