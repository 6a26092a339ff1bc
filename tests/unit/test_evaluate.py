"""`evaluate` and `tune` without a server: batches, intervals, search, report, bad input."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_moe_routing import demo
from sglang_moe_routing.cli import app
from sglang_moe_routing.cli.evaluate import print_pairs
from sglang_moe_routing.errors import BenchError
from sglang_moe_routing.evaluation import tune as tuning
from sglang_moe_routing.evaluation.measure import (
    Interval,
    Measured,
    Setting,
    batches,
    bootstrap,
    figures,
)
from sglang_moe_routing.evaluation.pairs import Pair, compare
from sglang_moe_routing.evaluation.report import rows_of, write_report
from sglang_moe_routing.evaluation.run import Case, Result, cases
from sglang_moe_routing.evaluation.tune import Family, Trial, Tuning
from sglang_moe_routing.policies import builtin_registry
from sglang_moe_routing.text import TokenizedText

RUNNER = CliRunner()
TEXT = Path(__file__).parents[2] / "docs" / "cli.md"


def text_of(num_sequences: int, num_sources: int) -> TokenizedText:
    ids = torch.arange(num_sequences)[:, None].expand(-1, 3).clone()
    return TokenizedText(ids, tuple(f"{i}.txt" for i in range(num_sources)), 0)


# --- batches and figures -------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 9))
def test_batches_hold_every_sequence_once(
    batch_size: int, per_source: int, num_sources: int, seed: int
) -> None:
    text = text_of(batch_size * per_source * num_sources, num_sources)
    for grouping in ("mixed", "same"):
        rows = batches(text, Setting(batch_size, grouping), seed)  # type: ignore[arg-type]
        assert rows.shape[1] == batch_size
        assert sorted(rows.flatten().tolist()) == list(range(len(text.token_ids)))
        if grouping == "same":
            source = rows // (batch_size * per_source)
            assert bool((source == source[:, :1]).all())


@pytest.mark.parametrize("setting", [Setting(4), Setting(3, grouping="same")])
def test_sequences_that_make_no_whole_batches_are_refused(setting: Setting) -> None:
    with pytest.raises(BenchError, match=f"do not make batches of {setting.batch_size}"):
        batches(text_of(10, 2), setting, 0)


@pytest.mark.parametrize(
    ("batch_size", "share", "expected"), [(16, 0.5, 8), (16, 0.0, 0), (4, 0.01, 1), (4, 0.99, 3)]
)
def test_a_mixed_batch_has_both_kinds(batch_size: int, share: float, expected: int) -> None:
    assert Setting(batch_size, vanilla_share=share).num_vanilla == expected


def test_the_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    differences = torch.randn(400, generator=generator).double() * 2 + 5
    found = bootstrap(differences)
    half = 1.96 * float(differences.std()) / 20
    assert found.mean == pytest.approx(float(differences.mean()))
    assert found.low == pytest.approx(found.mean - half, abs=0.03)
    assert found.high == pytest.approx(found.mean + half, abs=0.03)
    assert bootstrap(differences) == found


def measured(losses: torch.Tensor, follows: Sequence[bool], active: float) -> Measured:
    layers = torch.full((2,), active).double()
    best = torch.zeros(losses.shape, dtype=torch.int64)
    return Measured("p", Setting(2), losses, best, torch.tensor(follows), layers, layers)


def test_figures_of_a_mixed_batch_tell_both_kinds_apart() -> None:
    vanilla = measured(torch.ones(4, 3).double(), [True] * 4, 8)
    losses = torch.tensor([1.0, 1.5, 1.0, 1.7]).double()[:, None].expand(4, 3)
    found: Any = figures(measured(losses, [False, True, False, True], 4), vanilla)
    assert found["delta"] == pytest.approx(0.6)
    assert found["cross_entropy"] == pytest.approx(1.6)
    assert found["tokens"] == 6
    assert found["active_share"] == 0.5
    assert found["vanilla_rows"]["delta"] == 0
    assert found["vanilla_rows"]["largest_change_of_a_sequence"] == 0


def test_every_cell_comes_after_the_vanilla_that_it_is_compared_with() -> None:
    wanted = list(cases(["a", "vanilla", "b"], [1, 4], same_domain=True, vanilla_share=0.5))
    assert [c.policy for c in wanted if c.section == "policies"] == ["vanilla", "a", "b"] * 2
    assert [c.setting.batch_size for c in wanted if c.section == "mixed_policies"] == [4, 4]
    assert sum(c.section == "same_domain" for c in wanted) == 6


# --- pairs ---------------------------------------------------------------------------------------


def losing(*losses: float, active: float = 8.0) -> dict[str, Any]:
    return {"sequence_losses": list(losses), "active_experts": active}


def test_a_pair_is_compared_sequence_by_sequence() -> None:
    found = compare(losing(1.0, 5.0, 9.0, active=7.0), losing(1.5, 5.4, 9.6))
    assert found["difference"] == pytest.approx(-0.5)
    low, high = found["ci95"]
    assert -0.601 < low < high < -0.399  # though the sequences themselves differ by much
    assert found["told_from_0"]
    assert (found["active_experts_first"], found["active_experts_second"]) == (7.0, 8.0)


@pytest.mark.parametrize("second", [(1.0, 5.0, 9.0), (1.1, 4.8, 9.1)])
def test_an_interval_that_holds_0_is_not_told_from_it(second: tuple[float, ...]) -> None:
    found = compare(losing(1.0, 5.0, 9.0), losing(*second))
    assert found["ci95"][0] <= 0 <= found["ci95"][1]
    assert not found["told_from_0"]


@pytest.mark.parametrize("losses", [(1.0,), (1.0, float("nan"))])
def test_too_little_tells_nothing_from_0(losses: tuple[float, ...]) -> None:
    assert not compare(losing(*losses), losing(*[9.0] * len(losses)))["told_from_0"]


def test_a_result_compares_what_it_holds(tmp_path: Path) -> None:
    pairs = [Pair("a", "b"), Pair("b", "vanilla")]
    result = Result(tmp_path / "results.json", {}, pairs)
    losses = {"vanilla": 1.0, "a": 1.3, "b": 1.2}
    for case in cases(["a", "b"], [1, 4], vanilla_share=0.5):
        result.add(case, losing(*[losses[case.policy]] * 4))
    found = json.loads(result.file.read_text())["pairs"]
    places = [(row["section"], row["first"], row["batch_size"]) for row in found]
    assert sorted(places) == [
        ("mixed_policies", "a", 4),
        *(("policies", name, size) for name in "ab" for size in (1, 4)),
    ]
    for row in found:
        assert row["difference"] == pytest.approx(0.1 if row["first"] == "a" else 0.2)


def test_the_table_says_which_pairs_are_not_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    place = {"section": "policies", "first": "a", "second": "b", "batch_size": 4}
    near = compare(losing(1.0, 2.0), losing(1.2, 1.9))
    far = compare(losing(1.0, 2.0), losing(1.2, 2.2))
    print_pairs([{**place, **near}, {**place, **far}])
    lines = [line for line in capsys.readouterr().out.splitlines() if " -0." in line]
    assert ["not told from 0" in line for line in lines] == [True, False]
    assert "-0.2000 -0.2000" in lines[1]


# --- the search ----------------------------------------------------------------------------------


def trial(family: str, value: int, size: int, delta: float, active: float) -> Trial:
    interval = Interval(delta, delta - 0.01, delta + 0.01)
    return Trial(family, value, size, 3.0 + delta, interval, 0.005, 0.03, active, 40.0)


@given(st.integers(1, 40), st.integers(-1, 41))
def test_the_smallest_safe_value_is_found(num_values: int, first_safe: int) -> None:
    family = Family("f", "k0", range(10, 10 + num_values), {})
    asked: list[int] = []

    def attempt(family: Family, value: int, size: int) -> Trial:
        asked.append(value)
        return trial("f", value, size, 0.0 if value - 10 >= first_safe else 1.0, value)

    found = tuning._smallest(family, 4, attempt)
    safe = [value for value in family.values if value - 10 >= first_safe]
    assert (found and found.value) == (safe[0] if safe else None)
    assert len(asked) <= num_values.bit_length()


def test_of_equally_many_experts_the_better_quality_wins() -> None:
    plain = [trial("plain", 12, 4, 0.020, 12), trial("plain", 28, 16, 0.020, 28)]
    mapped = [trial("mapped", 12, 4, 0.015, 12), trial("mapped", 28, 16, 0.018, 28)]
    fewer = [trial("fewer", 11, 4, 0.024, 11), trial("fewer", 27, 16, 0.024, 27)]
    assert tuning._merit(fewer) < tuning._merit(mapped) < tuning._merit(plain)


def test_safe_leaves_a_standard_error_to_spare() -> None:
    assert trial("f", 1, 4, 0.024, 9).is_safe
    assert not trial("f", 1, 4, 0.026, 9).is_safe
    assert trial("f", 1, 4, 0.030, 9).is_within


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True), st.data())
def test_between_two_sizes_the_safer_value_holds(sizes: list[int], data: st.DataObject) -> None:
    sizes = sorted(sizes)
    values = {size: data.draw(st.integers(1, 30)) for size in sizes}
    family = Family("budget", "max_active", range(1, 31), {"kind": "budget"})
    definition = tuning.definition_of(Tuning(family, values, [], []))
    policy: Any = builtin_registry()["budget"].model_validate(definition)
    assert (policy.engage.min_rows, policy.engage.max_rows) == (sizes[0], sizes[-1])
    for rows in range(sizes[0], sizes[-1] + 1):
        below = max(size for size in sizes if size <= rows)
        above = min(size for size in sizes if size >= rows)
        expected = max(values[below], values[above])
        assert policy.max_active.value(0, rows) == expected


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (32, 4), (64, 8), (128, 8), (512, 10)])
@pytest.mark.parametrize("metric", [None, "routed", "least_squares"])
def test_every_candidate_fits_the_model(num_experts: int, top_k: int, metric: str | None) -> None:
    found = tuning.families(num_experts, top_k, tuning.KINDS, metric=metric)
    assert {family.kind for family in found} == {*tuning.KINDS} - (set() if metric else {"sere"})
    definitions = tuning.candidates(found)
    assert len(definitions) == sum(len(family.values) for family in found)
    for definition in definitions.values():
        policy = builtin_registry()[definition["kind"]].model_validate(definition)
        assert policy.check(top_k, num_experts) == []


def weighings(kind: str, **model: Any) -> list[object]:
    found = tuning.families(64, 8, [kind], **model)
    return [
        "mapped" if "mapped_share" in family.rest else family.rest.get("compensation")
        for family in found
    ]


def test_the_papers_weights_are_tried_once() -> None:
    paper, raw = [None, 0.8, 0.6, 0.4], [None, 1.0, 0.8, 0.6, 0.4]
    for kind in ("budget", "oea", "topk", "lynx", "xshare"):
        assert weighings(kind) == paper
        assert weighings(kind, normalizes=False) == raw
    assert weighings("budget", metric="routed") == [*paper, "mapped"]
    assert weighings("sere", metric="routed", normalizes=False) == paper
    assert weighings("sere", metric="least_squares") == raw  # None: the artifact's coefficients


class Measurements:
    """Stands for an `Evaluation`: `loss` of a family's value, T being the value itself."""

    def __init__(self, loss: Callable[[str, int, int], float], seed: int = 0) -> None:
        self.loss = loss
        self.asked: list[tuple[str, int, int]] = []
        self.noise = torch.randn(32, generator=torch.Generator().manual_seed(seed)).double()

    def vanilla(self, setting: Setting) -> Measured:
        return self._measured(0.0, 60.0)

    def measure(self, policy: str, setting: Setting) -> Measured:
        family, _, value = policy.rpartition("-")
        self.asked.append((family, int(value), setting.batch_size))
        return self._measured(self.loss(*self.asked[-1]), float(value))

    def _measured(self, over: float, active: float) -> Measured:
        losses = 4 + over + over * self.noise[:, None] / 10
        return measured(losses, [True] * 32, active)


FULL = {"f": 40, "f-c0.8": 36, "f-c0.6": 30, "f-c0.4": 44, "g": 34, "g-c0.6": 20}
"""Value from which on the increase stays within a bound of 0.04, at a batch size of 16."""


def loss(family: str, value: int, size: int) -> float:
    return 0.04 * FULL[family] / value * (1 if size == 16 else 0.5)


def made(*names: str, values: Sequence[int] = range(2, 60, 2)) -> list[Family]:
    return [Family(name, "max_active", values, {"kind": name[0]}) for name in names]


def found_by(
    found: Sequence[Family], sizes: Sequence[int] = (4, 16), confirm: Any = None, **more: Any
) -> tuple[Tuning, list[tuple[str, int, int]]]:
    search: Any = Measurements(more.get("loss", loss))
    tuned = tuning.tune(search, confirm or Measurements(loss, seed=1), found, sizes, 0.01)
    return tuned, search.asked


def test_other_weights_start_from_the_value_that_the_first_ones_need() -> None:
    tuned, asked = found_by(made("f", "f-c0.8", "f-c0.6", "f-c0.4"), sizes=[16])
    assert [entry[:2] for entry in asked if entry[0] != "f"] == [
        *[("f-c0.8", value) for value in (40, 38, 36)],
        *[("f-c0.6", value) for value in (36, 34, 32, 30)],
        *[("f-c0.4", value) for value in (30, 32)],  # worse: one step down, and the same
    ]
    assert (tuned.chosen.name, tuned.values) == ("f-c0.6", {16: 32})


def test_weights_are_found_as_if_their_kind_had_no_others() -> None:
    alone, _ = found_by(made("f-c0.6"))
    tuned, asked = found_by(made("f", "f-c0.8", "f-c0.6", "f-c0.4"))
    assert (tuned.chosen.name, tuned.values) == (alone.chosen.name, alone.values)
    assert tuned.values[4] < tuned.values[16]
    assert len(asked) == len(set(asked))


def test_weights_that_only_match_cost_one_trial_where_another_kind_is_better() -> None:
    found = [*made("g-c0.6"), *made("f", "f-c0.4", values=[10, 50])]
    _, asked = found_by(found, sizes=[16])
    assert [entry for entry in asked if entry[0] == "f-c0.4"] == [("f-c0.4", 10, 16)]


def test_of_equal_values_the_weights_with_the_better_quality_win() -> None:
    gains = {"f": 0.0, "f-c0.8": 0.0002, "f-c0.6": 0.0001}

    def close(family: str, value: int, size: int) -> float:
        return loss("f", value, size) - gains[family]

    tuned, _ = found_by(made(*gains), loss=close, confirm=Measurements(close))
    assert tuned.chosen.name == "f-c0.8"


def test_weights_that_lose_at_one_size_are_left() -> None:
    def crossing(family: str, value: int, size: int) -> float:
        return loss(family if size == 16 else "f-c0.4" if "-c" in family else "f", value, size)

    tuned, _ = found_by(made("f", "f-c0.6"), loss=crossing)
    assert tuned.chosen.name == "f"


def test_a_family_that_keeps_the_bound_at_one_size_only_stops_no_other() -> None:
    def partly(family: str, value: int, size: int) -> float:
        if family == "f":
            return 0.001 if size == 4 else 1.0
        return loss(family, value, size)

    tuned, _ = found_by(made("f", "g"), loss=partly, confirm=Measurements(partly))
    assert tuned.chosen.name == "g"


def test_what_the_other_half_does_not_confirm_is_raised() -> None:
    harder = Measurements(lambda family, value, size: 1.2 * loss(family, value, size))
    tuned, _ = found_by(made("g", "g-c0.6"), confirm=harder)
    plain, _ = found_by(made("g", "g-c0.6"))
    assert tuned.chosen.name == plain.chosen.name == "g-c0.6"
    assert tuned.values[16] > plain.values[16]
    assert 16 in tuned.raised
    for trial in tuned.confirmed:
        assert trial.is_within


def test_no_family_within_the_bound_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"within 1\.00% of vanilla's at batch sizes 4, 16"):
        found_by(made("f", "f-c0.6", values=range(2, 10)))


def test_halves_share_no_sequence() -> None:
    first, second = tuning.halves(text_of(10, 2))
    assert sorted([*first.token_ids[:, 0], *second.token_ids[:, 0]]) == list(range(10))


# --- the report ----------------------------------------------------------------------------------


def result_file(folder: Path, *pairs: Pair) -> Result:
    about = {
        "model": "m<odel>",
        "settings": {"batch_sizes": [4], "vanilla_share": 0.0},
        "machine": {"processor": "p & q", "versions": {"sglang": "0"}},
        "command": "evaluate '<x>'",
    }
    result = Result(folder / "results.json", about, pairs)
    vanilla = measured(torch.ones(4, 3).double(), [True] * 4, 8)
    for name, losses in (("vanilla", 1.0), ("<b>bold", 1.2)):
        own = measured(torch.full((4, 3), losses).double(), [True] * 4, 8 / losses)
        result.add(Case("policies", name, Setting(4)), figures(own, vanilla))
    return result


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    result = result_file(tmp_path)
    families = {"vanilla": "vanilla", "<b>bold": "oea"}
    files = write_report(result.as_json(), families, tmp_path)
    assert {file.name for file in files} == {
        "results.csv", "pareto.png", "layers.png", "report.html",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
    assert "p &amp; q" in page
    assert "Partial." in page
    (row,) = [r for r in csv.DictReader((tmp_path / "results.csv").open()) if r["family"] == "oea"]
    assert float(row["delta"]) == pytest.approx(0.2)


def test_a_complete_report_says_nothing_of_parts(tmp_path: Path) -> None:
    result = result_file(tmp_path)
    result.complete = True
    result.write()
    assert json.loads(result.file.read_text())["complete"]
    write_report(result.as_json(), {}, tmp_path)
    assert "Partial." not in (tmp_path / "report.html").read_text()


def test_the_report_says_which_pairs_are_not_told_apart(tmp_path: Path) -> None:
    result = result_file(tmp_path, Pair("<b>bold", "vanilla"))
    write_report(result.as_json(), {}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<td>&lt;b&gt;bold - vanilla</td><td>Batches of mixed text</td>" in page
    assert "+0.2000 to +0.2000" in page
    assert "not told from 0" not in page
    result.compared[0]["told_from_0"] = False
    write_report(result.as_json(), {}, tmp_path)
    assert "not told from 0" in (tmp_path / "report.html").read_text()


def test_rows_take_times_from_bench_serve(tmp_path: Path) -> None:
    rows = rows_of(result_file(tmp_path).as_json(), {}, {"vanilla": {"tpot_ms": 7.0}})
    assert [row["tpot_ms"] for row in rows] == [7.0, None]


# --- bad input -----------------------------------------------------------------------------------


def fails(*arguments: str) -> str:
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 1, done.output
    return " ".join(done.stderr.split())


def evaluate(tmp_path: Path, *more: str, model: Path = demo.MODEL) -> str:
    config = tmp_path / "routing.yaml"
    config.write_text("version: 1\npolicies: {fast: {kind: oea, k0: 2}}\n")
    options = ("--routing-config", str(config), "--out", str(tmp_path / "out"))
    return fails("evaluate", str(model), "--data", str(TEXT), *options, *more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "fast,slow"], "policy 'slow' is not in the config; choosable: vanilla, fa"),
        (["--num-sequences", "10000"], "sequences of 161 tokens, 10000 are needed"),
        (
            ["--batch-sizes", "7", "--num-sequences", "16", "--max-tokens", "8"],
            "16 sequences do not make batches of 7",
        ),
        (["--bench", "nosuch.json"], "--bench nosuch.json: cannot be read"),
        (
            ["--pairs", "fast:vanilla", "--pairs", "fast:slow"],
            "--pairs 'fast:slow': policy 'slow' is not measured; measured: vanilla, fast",
        ),
        (["--policies", "vanilla", "--pairs", "fast:vanilla"], "'fast' is not measured"),
        (["--pairs", "fast"], "--pairs 'fast': expected two policies as in 'budget:oea'"),
        (["--pairs", "fast:"], "--pairs 'fast:': expected two policies"),
        (["--pairs", "fast:fast"], "--pairs 'fast:fast': a policy does not differ from itself"),
    ],
)
def test_evaluate_names_what_is_wrong(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in evaluate(tmp_path, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", ["4,many", "0", ""])
def test_batch_sizes_are_positive_numbers(sizes: str) -> None:
    arguments = ["m", "--data", "d", "--out", "o.yaml", "--batch-sizes", sizes]
    done = RUNNER.invoke(app, ["tune", *arguments])
    assert done.exit_code == 2
    assert f"--batch-sizes {sizes!r}" in done.stderr


def test_a_file_that_is_no_bench_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"policies": 3}')
    assert "is no result of bench serve" in evaluate(tmp_path, "--bench", str(tmp_path / "x.json"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    text = evaluate(tmp_path, "--num-sequences", "4", "--max-tokens", "8", model=model)
    assert "its vocabulary has 20: the tokenizer is another model's" in text


def tune(tmp_path: Path, *more: str) -> str:
    out = ("--out", str(tmp_path / "tuned.yaml"))
    return fails("tune", str(demo.MODEL), "--data", str(TEXT), *out, *more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "oea,xyz"], "--kinds: 'xyz' cannot be tuned; choose of budget, oea, sere"),
        (
            ["--num-sequences", "24"],
            "two halves of it do not make batches of 16; use a multiple of 32",
        ),
        (["--similarity", "nosuch.safetensors"], "nosuch.safetensors"),
    ],
)
def test_tune_names_what_is_wrong(tmp_path: Path, options: list[str], message: str) -> None:
    more = () if "--num-sequences" in options else ("--num-sequences", "32", "--max-tokens", "8")
    assert message in tune(tmp_path, *options, *more)
    assert not (tmp_path / "tuned.yaml").exists()


def test_tune_replaces_a_config_on_request_only(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("mine")
    assert "is there already; add --overwrite" in tune(tmp_path)
    assert (tmp_path / "tuned.yaml").read_text() == "mine"
