"""What a type checker must see of the public names. mypy reads this file; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, assert_type

from pydantic import Field
from torch import Tensor

import sglang_moe_routing
from sglang_moe_routing import Policy, PolicyRegistry, SimilarityArtifact, load_artifact
from sglang_moe_routing.config import LoadedConfig, RoutingConfig, load_config
from sglang_moe_routing.errors import ArtifactError, RoutingError, RoutingRequestError
from sglang_moe_routing.kernels import BoundLayer, refine
from sglang_moe_routing.policies import (
    Mapped,
    Place,
    PolicyTable,
    Rerouted,
    Router,
    Rows,
    Rule,
    TorchPolicy,
    build_table,
    builtin_registry,
    reroute,
)
from sglang_moe_routing.testing import Checked, check_calls, check_policy, read_records


class Doubling(Mapped):
    """A kind whose rule follows the live rows."""

    kind: Literal["doubling"] = "doubling"
    share: Annotated[float, Field(gt=0, le=1)]

    def rule(self, place: Place) -> Rule:
        assert_type(place.live_rows, int)
        budget = place.top_k + round(self.share * place.num_experts)
        return Rule(k0=0, max_active=budget, **self.weights())


class AtLeast(TorchPolicy):
    """A kind in torch."""

    kind: Literal["at_least"] = "at_least"
    share: float = 0.1

    def required(self, rows: Rows) -> Tensor:
        assert_type(rows.gates, Tensor)
        return rows.chosen

    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.take(rows.chosen & union)


def of_configs(path: Path) -> None:
    loaded = load_config(path)
    assert_type(loaded, LoadedConfig)
    assert_type(loaded.config, RoutingConfig)
    assert_type(loaded.similarity_paths, dict[str, Path])
    assert_type(sglang_moe_routing.__version__, str)


def of_kinds() -> None:
    registry = builtin_registry()
    assert_type(registry, PolicyRegistry)
    assert_type(registry["oea"], type[Policy])
    assert_type(registry.register(Doubling), type[Policy])
    Doubling(share="much")  # type: ignore[arg-type]
    Doubling(parts=0.5)  # type: ignore[call-arg]
    Rule(k0=1, exponent=3)  # type: ignore[arg-type]


def of_artifacts(path: Path) -> None:
    artifact = load_artifact(path)
    assert_type(artifact, SimilarityArtifact)
    assert_type(artifact.matrices[0], Tensor)


def of_errors(error: RoutingRequestError) -> RoutingError:
    assert_type(error.status, int)
    assert_type(error.reason, str)
    return ArtifactError("unreadable")


def of_calls(scores: Tensor, ids: Tensor, weights: Tensor, plan: Tensor, layer: BoundLayer) -> None:
    table = build_table([Doubling(share=0.1)], layer=0, top_k=8, num_experts=64)
    assert_type(table, PolicyTable)
    router = Router()
    done = reroute(scores, scores, ids, weights, plan, table, renormalize=True)
    assert_type(done, Rerouted)
    assert_type(done.topk_ids, Tensor)
    assert_type(refine(scores, ids, weights, plan, table, router), tuple[Tensor, Tensor, Tensor])
    layer.reroute(scores, ids, weights, plan, router.bias, 0)


def of_checks(folder: Path) -> None:
    check_policy(Doubling(share=0.1))
    checked = check_calls(read_records(folder))
    assert_type(checked, Checked)
    assert_type(checked.num_calls, int)
