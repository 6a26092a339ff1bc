"""Random requests to the real server: it answers each, rightly, and is the same afterwards.

The examples are the same in every run. `FUZZ_EXAMPLES` sets their number; `FUZZ_SEED` chooses
others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

from .conftest import HEADER, RULES, Running
from .test_faults import policy_header, send
from .test_requests import AVAILABLE, ENDPOINTS

KNOWN = set(AVAILABLE.split(", "))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
SEED = os.environ.get("FUZZ_SEED")

# --- what is sent ------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.one_of(
    st.sampled_from([*RULES, "late", "everywhere", "private", "unknown", "OEA-K3", ""]),
    st.text(max_size=70),
)
header_values = st.one_of(
    names.map(lambda name: name.encode()),
    st.lists(names, max_size=3).map(lambda several: ", ".join(several).encode()),
    st.binary(max_size=200),
).map(lambda value: value.translate(None, b"\r\n"))  # these would be headers of their own
custom_params = st.one_of(
    st.fixed_dictionaries({"moe_routing_policy": names}),
    st.fixed_dictionaries({"moe_routing_policy": values}),
    st.fixed_dictionaries({"moe_routing_group": values}),
    st.dictionaries(st.text(max_size=8), values, max_size=3),
    values,
)
models = st.one_of(
    st.just("demo"), names.map("demo@{}".format), names.map("other@{}".format), st.text(max_size=30)
)
odd_headers = st.lists(
    st.sampled_from(
        [
            b"Accept: text/html",
            b"Content-Type: text/plain",
            b"Content-Type: multipart/form-data",
            b"Authorization: Bearer x",
            b"X-Moe-Routing-Policy-2: oea-k3",
            b"X_MoE_Routing_Policy: oea-k3",
            b"Expect: 100-continue",
            b"Range: bytes=0-1",
            b"Upgrade: websocket",
        ]
    ),
    max_size=2,
)


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    """A good request to an endpoint that generates, with policies asked for in odd ways."""
    path = draw(st.sampled_from(list(ENDPOINTS)))
    body: dict[str, Any] = {**ENDPOINTS[path]}
    if draw(st.booleans()):
        body["stream"] = draw(st.booleans())
    if "model" in body:
        body["model"] = draw(models)
    if draw(st.booleans()):
        params = draw(custom_params)
        if path == "/generate":
            body["sampling_params"] = {**body["sampling_params"], "custom_params": params}
        else:
            body["custom_params"] = params
    headers = draw(st.one_of(st.just([]), st.lists(header_values, min_size=1, max_size=2)))
    return {
        "path": path,
        "body": body,
        "headers": [*map(policy_header, headers), *draw(odd_headers)],
    }


READING = ("/v1/moe_routing/policies", "/v1/moe_routing/statistics")
RELOAD = "/moe_routing/reload"
METHODS = ("GET", "GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO")
queries = st.one_of(
    st.just(""),
    st.text("abc=&%?/.#[]+;:@0123456789", max_size=40).map("?{}".format),
)


@st.composite
def readings(draw: st.DrawFn) -> dict[str, Any]:
    """A request to a route of this package."""
    return {
        "path": draw(st.sampled_from([*READING, RELOAD])) + draw(queries),
        "method": draw(st.sampled_from(METHODS)),
        "body": draw(st.one_of(st.none(), values)),
        "headers": [
            *map(policy_header, draw(st.lists(header_values, max_size=2))),
            *draw(odd_headers),
        ],
    }


# --- what must hold ----------------------------------------------------------------------------


def bare(request: dict[str, Any]) -> dict[str, Any]:
    """The same request without policies in the header and in the model's name."""
    body = dict(request["body"])
    if "@" in body.get("model", ""):
        body["model"] = "demo"
    headers = [line for line in request["headers"] if not line.startswith(HEADER.encode())]
    return {**request, "body": body, "headers": headers}


@pytest.fixture
def plain_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Address of a server without this package, started when it is first needed."""
    return lambda: str(request.getfixturevalue("plain").url)


def greedy(url: str) -> bytes:
    """Text of a vanilla completion, 32 tokens."""
    prompt = "In the beginning there was a model with many experts, and it was"
    params = {"max_new_tokens": 32, "temperature": 0, "ignore_eos": True}
    answer = send(url, "/generate", {"text": prompt, "sampling_params": params})
    assert (answer.status, answer.policy) == (200, "vanilla")
    return answer.body.partition(b'"meta_info"')[0]


def fuzz(number: int, requests: st.SearchStrategy[dict[str, Any]]) -> Callable[..., Any]:
    """Decorator: run a test on `number` random requests; no shrinking past what is readable."""
    chosen = settings(
        max_examples=number,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        run = chosen(given(requests)(test))
        return run if SEED is None else seed(int(SEED))(run)

    return decorate


def report(capsys: pytest.CaptureFixture[str], what: str, statuses: Counter[int]) -> None:
    listed = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    with capsys.disabled():
        print(f"\n{what}: {statuses.total()} requests ({listed})")


def test_random_generations(
    served: Running, plain_url: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A 5xx is a failure unless SGLang alone gives it too; `send` fails after 60 seconds."""
    statuses: Counter[int] = Counter()
    before = greedy(served.url)

    @fuzz(EXAMPLES, generations())
    def run(request: dict[str, Any]) -> None:
        answer = send(served.url, **request)
        statuses[answer.status] += 1
        event(str(answer.status))
        if answer.status >= 500:
            assert send(plain_url(), **bare(request)).status >= 500, answer.body
        if answer.status == 200:
            assert answer.policy in KNOWN
        elif answer.status < 500:
            assert answer.message.strip()

    run()
    report(capsys, "generations", statuses)
    assert statuses[200] > EXAMPLES // 10
    assert statuses[400] > EXAMPLES // 10
    assert greedy(served.url) == before


def test_random_readings(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading is answered whatever comes with it, reloading needs a key that there is not, and
    every other method is refused."""
    statuses: Counter[int] = Counter()
    before = greedy(served.url)

    @fuzz(EXAMPLES, readings())
    def run(request: dict[str, Any]) -> None:
        answer = send(served.url, **request)
        statuses[answer.status] += 1
        is_reload = request["path"].startswith(RELOAD)
        good, of_good = ("POST", 403) if is_reload else ("GET", 200)
        expected = of_good if request["method"] == good else 405
        assert answer.status in (expected, 400), answer.body
        assert answer.policy is None
        assert answer.body or request["method"] == "HEAD"

    run()
    report(capsys, "readings", statuses)
    assert statuses[200] > EXAMPLES // 10
    assert greedy(served.url) == before
