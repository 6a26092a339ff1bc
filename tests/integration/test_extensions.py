"""The applied policy in OpenAI's formats, as SGLang 0.5.23 has them and as they may become.

SGLang fills ``metadata`` of whole answers with more than text, which OpenAI's own schema does not
allow. A proposal upstream moves that to ``sglext``, where 0.5.23 keeps its other extensions.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer

pytest.importorskip("sglang")
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.utils.weight_versions import build_endpoint_weight_version_metadata

from sglang_moe_routing.integration.hooks.http.response import after_whole, name_policy

USAGE = protocol.UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)
META: dict[str, Any] = {
    "moe_routing_policy": "fast",
    "weight_version": "v1",
    "weight_versions": [{"version": "v1", "start": 0, "end": 1}],
}
CHAT = protocol.ChatCompletionResponse(
    id="a",
    model="demo",
    choices=[
        protocol.ChatCompletionResponseChoice(
            index=0,
            message=protocol.ChatMessage(role="assistant", content="Hi"),
            finish_reason="stop",
        )
    ],
    usage=USAGE,
)
TEXT = protocol.CompletionResponse(
    id="a",
    model="demo",
    choices=[protocol.CompletionResponseChoice(index=0, text="Hi", finish_reason="stop")],
    usage=USAGE,
)


class StrictChat(ChatCompletion):
    """OpenAI's answer with the ``metadata`` of its newer SDKs: text by text."""

    metadata: dict[str, str] | None = None


class StrictText(Completion):
    metadata: dict[str, str] | None = None


class FutureExt(protocol.SglExt):
    """SGLang's extensions as proposed upstream: versions of the weights are among them."""

    weight_version: str | None = None
    weight_versions: list[dict[str, Any]] | None = None


def future(response: BaseModel) -> BaseModel:
    """SGLang's own response as the proposal would fill it: no ``metadata``, if there is none."""
    model: Any = type(response)

    class Future(model):  # type: ignore[misc]
        sglext: FutureExt | None = None

        @model_serializer(mode="wrap")
        def _serialize(self, handler: Any) -> Any:
            return {k: v for k, v in handler(self).items() if k != "metadata" or v is not None}

    Future.model_config = ConfigDict(title=model.__name__)
    versions = {key: META[key] for key in ("weight_version", "weight_versions")}
    return Future(**{**dict(response), "sglext": FutureExt(**versions)})


def today(response: BaseModel) -> BaseModel:
    """SGLang's own response as 0.5.23 fills it."""
    metadata = build_endpoint_weight_version_metadata(META)
    return response.model_copy(update={"metadata": metadata})


def sent(response: BaseModel) -> dict[str, Any]:
    """What a client receives once the policy is named."""
    named = after_whole(response, None, None, [{"meta_info": META}], 0)
    assert isinstance(named, type(response))
    return json.loads(named.model_dump_json(by_alias=True))


FORMATS = pytest.mark.parametrize(
    ("response", "schema"), [(CHAT, StrictChat), (TEXT, StrictText)], ids=["chat", "text"]
)


@FORMATS
def test_todays_answer_names_the_policy_in_both_places(response: Any, schema: Any) -> None:
    found, stock = sent(today(response)), json.loads(today(response).model_dump_json())
    assert found.pop("sglext") == {"moe_routing_policy": "fast"}
    assert found["metadata"].pop("moe_routing_policy") == "fast"
    assert found == stock


@FORMATS
def test_all_that_strict_clients_refuse_is_sglangs_own(response: Any, schema: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(sent(today(response)), strict=False)
    assert {error["loc"] for error in caught.value.errors()} == {("metadata", "weight_versions")}


@FORMATS
def test_answer_to_come_names_it_among_the_extensions_alone(response: Any, schema: Any) -> None:
    found = sent(future(response))
    assert "metadata" not in found
    assert found["sglext"].pop("moe_routing_policy") == "fast"
    assert found == json.loads(future(response).model_dump_json())
    assert schema.model_validate(sent(future(response))).choices[0].finish_reason == "stop"


def test_extensions_that_a_client_asked_for_stay() -> None:
    asked = CHAT.model_copy(update={"sglext": protocol.SglExt(output_ids=[[7]])})
    found = json.loads(name_policy(asked, "fast").model_dump_json())["sglext"]
    assert found == {"output_ids": [[7]], "moe_routing_policy": "fast"}
