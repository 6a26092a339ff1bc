"""KV of one policy is no other's: in SGLang's events about it, on the host and in a file store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import free_port

from .conftest import HEADER, Running

pytest.importorskip("sglang")
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, KVEventBatch
from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64

PAGE = 16
CONFIG = """
version: 1
policies:
  fast: {kind: oea, k0: 3}
  also-fast: {kind: oea, k0: 3}
  other: {kind: topk, k0: 2}
"""
NAMESPACES = ("vanilla", "fast", "other")


@dataclass
class Caching:
    """A server with a host cache and a file store, and a subscriber to its KV events."""

    running: Running
    store: Path
    events: zmq.Socket[bytes]
    decoder: msgspec.msgpack.Decoder[Any] = field(
        default_factory=lambda: msgspec.msgpack.Decoder(KVEventBatch)
    )

    def generate(self, policy: str, text: str, **extra: Any) -> dict[str, Any]:
        params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = self.running.http.post(
            "/generate",
            json={"text": text, "sampling_params": params, **extra},
            headers={HEADER: policy},
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["meta_info"])

    def read_events(self) -> list[Any]:
        """All events until nothing comes for a second."""
        found = []
        while self.events.poll(1000):
            *_, payload = self.events.recv_multipart()
            found += self.decoder.decode(payload).events
        return found

    def stored(self, work: Callable[[], Any]) -> list[BlockStored]:
        """What is announced as stored on the device during `work`."""
        self.read_events()
        work()
        return [e for e in self.read_events() if isinstance(e, BlockStored) and e.medium == "GPU"]

    def settle(self) -> int:
        """Number of stored pages once it no longer grows."""
        sizes = [-1]
        while sizes[-3:] != sizes[-1:] * 3:
            time.sleep(0.3)
            sizes.append(len(list(self.store.glob("*.bin"))))
        return sizes[-1]


@pytest.fixture(scope="module")
def caching(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Caching]:
    folder = tmp_path_factory.mktemp("caching")
    (folder / "routing.yaml").write_text(CONFIG)
    address = f"127.0.0.1:{free_port()}"
    publisher = f'{{"publisher": "zmq", "endpoint": "tcp://{address}", "bind": true}}'
    flags = ("--page-size", str(PAGE), "--max-total-tokens", "8192", "--enable-cache-report")
    flags += ("--kv-events-config", publisher)
    flags += ("--enable-hierarchical-cache", "--hicache-storage-backend", "file")
    flags += ("--hicache-storage-prefetch-policy", "wait_complete")
    store = folder / "store"
    settings = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}
    with (
        start(folder / "routing.yaml", *flags, **settings) as running,
        zmq.Context() as context,
        context.socket(zmq.SUB) as events,
    ):
        events.connect(f"tcp://{address}")
        events.subscribe(b"")
        yield Caching(running, store, events)


def test_events_name_other_blocks_under_another_policy(caching: Caching) -> None:
    prompt = "Events speak of blocks by the hash of their tokens and of their salt. " * 3
    blocks = {
        policy: caching.stored(lambda policy=policy: caching.generate(policy, prompt))
        for policy in NAMESPACES
    }
    hashes = {policy: {h for e in blocks[policy] for h in e.block_hashes} for policy in blocks}
    assert all(len(found) >= 2 for found in hashes.values())
    assert len(set.union(*hashes.values())) == sum(map(len, hashes.values()))


def test_events_of_equal_policies_name_the_same_blocks(caching: Caching) -> None:
    prompt = "Two names for one rule are one namespace, and so they share every block. " * 3
    stored = caching.stored(lambda: caching.generate("fast", prompt))
    assert stored
    assert not caching.stored(lambda: caching.generate("also-fast", prompt))


def test_events_of_vanilla_requests_are_those_of_stock_sglang(caching: Caching) -> None:
    prompt = "Nothing is added to what a vanilla request keeps in the cache, not a bit. " * 3
    stored = caching.stored(lambda: caching.generate("vanilla", prompt))
    tokens = [token for event in stored for token in event.token_ids]
    assert [h for event in stored for h in event.block_hashes] == [
        hash_str_to_int64(page) for page in get_hash_str(tokens, page_size=PAGE)
    ]
    assert all(event.cache_salt is None for event in stored)


def test_a_removed_block_is_not_announced_as_that_of_another_policy(caching: Caching) -> None:
    prompt = "What one policy gives up another may still hold, and a router believes it. " * 3
    kept = caching.stored(lambda: caching.generate("fast", prompt))
    caching.generate("other", prompt)
    caching.read_events()
    for i in range(40):  # the pool holds 8192 tokens; `fast` stays the most recently used
        caching.generate("other", f"Filler {i} " + demo.read_prompts()[i % 8] * 8)
        caching.generate("fast", prompt)
    events = [e for e in caching.read_events() if isinstance(e, BlockRemoved) and e.medium == "GPU"]
    removed = {h for event in events for h in event.block_hashes}
    assert removed, "the pool was never full"
    assert not removed & {h for event in kept for h in event.block_hashes}


@pytest.mark.parametrize("writer", NAMESPACES)
def test_stored_kv_serves_its_own_policy_only(caching: Caching, writer: str) -> None:
    prompt = f"Pages that {writer} wrote to the store, and whom they serve. " * 24
    before = caching.settle()
    caching.generate(writer, prompt)
    assert caching.settle() > before
    for policy in (*(name for name in NAMESPACES if name != writer), writer):
        assert caching.running.http.post("/flush_cache").status_code == 200
        cached = caching.generate(policy, prompt)["cached_tokens"]
        assert (cached > 256) == (policy == writer), f"{policy} found {cached} cached tokens"


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_a_clients_own_namespace_separates_stored_kv_further(caching: Caching, field: str) -> None:
    prompt = f"Pages under a {field} of the client, beside those of the policy. " * 24
    caching.generate("fast", prompt, **{field: "mine"})
    caching.settle()

    def cached(policy: str, **extra: str) -> int:
        assert caching.running.http.post("/flush_cache").status_code == 200
        return int(caching.generate(policy, prompt, **extra)["cached_tokens"])

    assert cached("vanilla", **{field: "mine"}) == 0
    assert cached("fast", **{field: "other"}) == 0
    assert cached("fast", **{field: "mine"}) > 256
