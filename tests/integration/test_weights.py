"""Which weights a process serves, and which it lets in while policies lean on artifacts."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sglang")
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.server_args import ServerArgs

from sglang_moe_routing import demo, runtime
from sglang_moe_routing.artifacts import SimilarityArtifact, save_artifact
from sglang_moe_routing.checkpoint import Fingerprint
from sglang_moe_routing.config import LoadedConfig, load_config
from sglang_moe_routing.errors import ArtifactError
from sglang_moe_routing.integration.attach import check_artifacts
from sglang_moe_routing.integration.hooks.scheduler import weights as hook
from sglang_moe_routing.integration.reloading import Staged
from sglang_moe_routing.policies import FreeSlots, Router, Sizes, Vanilla, build_table
from sglang_moe_routing.runtime import Layer, Process, process, used_artifacts
from sglang_moe_routing.runtime.definitions import define
from sglang_moe_routing.runtime.weights import (
    CHECKPOINT_FORMATS,
    ServedWeights,
    check_former,
    unknown,
)

SERE = "similar: {kind: sere, num_primary: 1}"
FAST = "fast: {kind: oea, k0: 3}"
MINE = Fingerprint("structure", "mine")
OTHER = ServedWeights("/other", Fingerprint("structure", "other"))


class Request:
    """Something that uses a policy."""

    is_finished = False

    def finished(self) -> bool:
        return self.is_finished


def load(folder: Path, policies: str, allow: str = "false") -> LoadedConfig:
    artifact = SimilarityArtifact({0: torch.eye(4)}, "cosine", "tiny", fingerprint=MINE)
    save_artifact(artifact, folder / "a.safetensors")
    path = folder / "routing.yaml"
    source = f"{{path: a.safetensors, allow_other_weights: {allow}}}"
    path.write_text(f"version: 1\nsimilarity: {{a: {source}}}\npolicies: {{{policies}}}\n")
    return load_config(path)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    monkeypatch.setattr(process, "_current", None)
    return runtime.start(load(tmp_path, f"{SERE}, {FAST}"))


def adopt(state: Process, loaded: LoadedConfig) -> None:
    state.adopt(loaded, used_artifacts(loaded))


def test_weights_of_the_artifact_come_in_and_others_do_not(state: Process) -> None:
    assert hook._problem(ServedWeights("/copy", MINE)) == ""
    assert "was made for other weights than /other" in hook._problem(OTHER)
    assert "weights of IPC: nothing tells which they are" in hook._problem(unknown("IPC"))


def test_an_artifact_of_other_sizes_is_refused(tmp_path: Path) -> None:
    loaded = load(tmp_path, SERE)
    artifacts = used_artifacts(loaded)
    with pytest.raises(ArtifactError, match="'a' is for 4 experts, but layer 0 of this model has"):
        check_artifacts(loaded, artifacts, {0: Sizes(2, 64)}, ServedWeights("/copy", MINE))
    with pytest.raises(ArtifactError, match=r"'a' has no matrix for MoE layers \[1\]"):
        check_artifacts(
            loaded, artifacts, {0: Sizes(2, 4), 1: Sizes(2, 4)}, ServedWeights("/copy", MINE)
        )
    check_artifacts(loaded, artifacts, {0: Sizes(2, 4)}, ServedWeights("/copy", MINE))


def test_without_a_policy_that_uses_it_an_artifact_holds_nothing_up(
    state: Process, tmp_path: Path
) -> None:
    adopt(state, load(tmp_path, FAST))
    assert hook._problem(OTHER) == hook._problem(unknown("IPC")) == ""


def test_other_weights_come_in_where_the_config_allows_them(state: Process, tmp_path: Path) -> None:
    adopt(state, load(tmp_path, SERE, allow="true"))
    assert hook._problem(OTHER) == hook._problem(unknown("IPC")) == ""


def test_a_running_request_holds_up_weights_that_its_former_policy_cannot_meet(
    state: Process, tmp_path: Path
) -> None:
    request = Request()
    state.ids.use(state.ids.of_name["similar"], request)
    adopt(state, load(tmp_path, FAST))
    with pytest.raises(ArtifactError, match="a running request keeps policy 'similar'"):
        check_former(state.ids.in_use(), state.artifacts, OTHER)
    del request
    check_former(state.ids.in_use(), state.artifacts, OTHER)


def test_a_finished_request_that_the_scheduler_still_holds_does_not_hold_up_weights(
    state: Process, tmp_path: Path
) -> None:
    """The overlap scheduler keeps its last two batches, on an idle server for good."""
    request = Request()
    state.ids.use(state.ids.of_name["similar"], request)
    batch = ScheduleBatch(reqs=[request])
    scheduler = SimpleNamespace(batch_record_ct=0, batch_record_buf=[None] * 2)
    Scheduler.record_batch_in_overlap(scheduler, batch)
    held = weakref.ref(request)
    del batch, request
    adopt(state, load(tmp_path, FAST))
    assert "a running request keeps policy 'similar'" in hook._problem(OTHER)
    held().is_finished = True
    assert hook._problem(OTHER) == ""


def test_a_finished_request_keeps_its_id_from_others_until_it_is_garbage(
    state: Process, tmp_path: Path
) -> None:
    """A forward that was launched before it finished may still read that id's policy."""
    request = Request()
    mine = state.ids.of_name["similar"]
    state.ids.use(mine, request)
    request.is_finished = True
    for number in range(3):
        adopt(state, load(tmp_path, f"p{number}: {{kind: topk, k0: 1}}"))
        assert state.ids.table[mine].name == "similar"


def test_a_reload_under_way_counts(
    state: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment that it is staged and that in which all take it over."""
    adopt(state, load(tmp_path, FAST))
    coming = load(tmp_path, SERE)
    artifacts = used_artifacts(coming)
    staged = Staged(coming, artifacts, define(coming, artifacts), ())
    monkeypatch.setattr(hook.PARTICIPANT, "staged", staged)
    assert "was made for other weights than /other" in hook._problem(OTHER)


def test_a_checkpoint_that_was_written_over_has_another_fingerprint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL, model)
    before = ServedWeights.of_checkpoint(str(model))
    assert before.fingerprint == ServedWeights.of_checkpoint(str(demo.MODEL)).fingerprint
    save_file({"weight": torch.ones(4)}, model / "model.safetensors")
    assert ServedWeights.of_checkpoint(str(model)).fingerprint != before.fingerprint


def test_a_checkpoint_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    found = ServedWeights.of_checkpoint(str(tmp_path))
    assert found.fingerprint is None
    assert "no safetensors checkpoint" in found.problem


@pytest.mark.parametrize("load_format", LoadFormat, ids=lambda load_format: load_format.value)
def test_weights_that_may_not_be_the_checkpoints_are_unknown(
    load_format: LoadFormat, state: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a server starts with them or an update asks for them."""
    flags = ServerArgs(model_path=str(demo.MODEL), load_format=load_format.value)
    is_read = load_format.value in CHECKPOINT_FORMATS
    assert (ServedWeights.at_start(flags).fingerprint is not None) == is_read
    monkeypatch.setattr(hook, "_refusal", hook._problem)  # there is no group of ranks
    runner = SimpleNamespace(model_config=SimpleNamespace(revision=None))
    updater = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    request = UpdateWeightFromDiskReqInput(
        model_path=str(demo.MODEL), load_format=load_format.value
    )
    answer = hook.around_disk(lambda *_: None, updater, request)
    is_unknown = f"load format {load_format.value} may load others" in answer.message
    assert is_unknown == (not is_read)


def test_a_layer_follows_a_bias_that_was_replaced() -> None:
    table = build_table([Vanilla()], layer=0, top_k=2, num_experts=4)
    router = Router(scoring="sigmoid", bias=torch.zeros(4))
    union = torch.zeros(4, dtype=torch.bool)
    layer = Layer(0, 0, 4, 2, router, FreeSlots.IGNORED, table, True, union)
    bias = torch.ones(4)
    layer.follow_bias(bias)
    assert layer.router.bias is bias
    assert replace(layer.router, bias=None) == replace(router, bias=None)
