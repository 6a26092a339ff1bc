"""Every route of the installed SGLang is known, and the documents list those that take a policy."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, File, Request, UploadFile
from fastapi.testclient import TestClient

pytest.importorskip("sglang")
from sglang.srt.entrypoints import http_server

from sglang_moe_routing import runtime
from sglang_moe_routing.config import DEFAULT_HEADER, load_config
from sglang_moe_routing.integration import selecting
from sglang_moe_routing.integration.hooks.http import endpoints as hooks
from sglang_moe_routing.integration.selecting import PolicyHeaderMiddleware, select_early
from sglang_moe_routing.runtime import process
from tests.endpoints import AUDIO, EMBEDS, GENERATES, OTHER_MODELS, SILENT

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


def paths(routes: Iterable[Any]) -> Iterator[str]:
    """Paths of an app's routes, those of included routers too."""
    for route in routes:
        if inner := getattr(route, "original_router", None):
            yield from paths(inner.routes)
        elif not route.path.startswith("/v1/moe_routing") and route.path != "/moe_routing/reload":
            yield route.path


def test_every_route_of_sglang_is_classified() -> None:
    known = GENERATES.keys() | OTHER_MODELS.keys() | AUDIO | EMBEDS | SILENT
    found = set(paths(http_server.app.routes))
    assert found - known == set(), "say in tests/endpoints.py whether these run a policy"
    assert known - found == set(), "SGLang has these no longer"


def test_documents_list_exactly_the_routes_that_run_the_model() -> None:
    _, _, rest = PAGE.read_text().partition("\n## Which endpoints\n")
    rows = [line.split("|")[1] for line in rest.partition("\n## ")[0].splitlines() if "|" in line]
    listed = set(re.findall(r"`(/[^`]+)`", " ".join(rows)))
    assert listed == GENERATES.keys() | OTHER_MODELS.keys() | AUDIO | EMBEDS


@pytest.mark.parametrize(("name", "status"), [("fast", 200), ("nonesuch", 400)])
def test_field_of_a_form_names_a_policy_as_one_of_json_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    """Audio comes as a form, and the demo model does not hear: the handler is none of SGLang's."""
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\npolicies: {fast: {kind: oea, k0: 3}}\n")
    monkeypatch.setattr(process, "_current", None)
    monkeypatch.setattr(selecting.http_server, "is_there", lambda: False)  # no warm-up to tell
    runtime.start(load_config(path))
    app = FastAPI()
    app.add_middleware(PolicyHeaderMiddleware)

    async def transcribe(*, raw_request: Request) -> str:
        select_early(None, raw_request)
        return ""

    @app.post("/")
    async def route(raw_request: Request, file: Annotated[UploadFile, File()]) -> str:
        assert file.size == 2
        return str(await hooks.around_form(transcribe, raw_request=raw_request))

    fields = {"model": "demo", "moe_routing_policy": name}
    response = TestClient(app).post("/", data=fields, files={"file": b"ab"})
    assert response.status_code == status, response.text
    assert response.headers.get(DEFAULT_HEADER) == (name if status == 200 else None)
