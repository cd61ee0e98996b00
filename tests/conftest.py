"Tiny checkpoints, written tensor by tensor, and what to look at before and after a restore."
import hashlib
import json
import os
import random
import re
import stat
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # torch's threads of one worker would take the other's core
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def together(test: str) -> str:
    """What stays with one worker: a file, whose fixtures its tests share. Notebooks and pages go to the one that is free.

    Not --dist loadgroup: it changes a name that pytest 9.2 no longer reads, and then says nothing."""
    return test if re.search(r"::test_(notebook|page)\[", test) else test.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = together
    return scheduler


def pytest_collection_modifyitems(items):
    for item in items:
        if why := _too_old(item.name): item.add_marker(pytest.mark.skip(reason=why))


LATER = {"transformers": ((5, 24), ("kimi_linear", "bailing_hybrid", "lfm3", "lara_mini", "zamba2", "latent_attention", "mla_is_recorded"))}


@cache
def _have(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version(package))[:2])


def _too_old(test: str) -> str:
    "Families that came into transformers after the oldest that we allow."
    late = (f"{p} {'.'.join(map(str, _have(p)))} is too old" for p, (new, names) in LATER.items() if _have(p) < new and any(n in test for n in names))
    return next(late, "")


KINDS = ["lightning-attn", "attn", "attn", "lightning-attn"]
NAME = "model.layers.{}.self_attn.{}_proj.weight"


def hypenet_config(**fields) -> dict:
    return {"model_type": "hypenet", "architectures": ["HypeNetForCausalLM"], "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "mixer_types": KINDS} | fields


def tensors(seed: int, dtype="bfloat16", layers: int = 4, hidden: int = 8, biases: bool = False) -> dict:
    import torch
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g).to(getattr(torch, dtype))
    found = {"model.embed_tokens.weight": new(16, hidden), "model.norm.weight": new(hidden)}
    for i in range(layers):
        for role, rows in dict(q=8, k=4, v=4).items():
            found[NAME.format(i, role)] = new(rows, hidden)
            if biases: found[NAME.format(i, role).replace("weight", "bias")] = new(rows)
        found[NAME.format(i, "o")] = new(hidden, 8)
        found[f"model.layers.{i}.self_attn.q_norm.weight"] = new(4)
    return found


def write_checkpoint(folder: Path, seed: int = 0, shards: int = 1, config: dict | None = None, weights: dict | None = None, **kw) -> Path:
    "A folder as save_pretrained would leave it, with a few of the files that people keep beside the weights."
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    weights = tensors(seed, **kw) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(hypenet_config() if config is None else config, indent=2))
    for name in ("generation_config.json", "tokenizer.json"): (folder / name).write_text(json.dumps({"seed": seed}))
    (folder / "README.md").write_text(f"# model {seed}\n")
    (folder / "logs").mkdir()
    (folder / "logs" / "train.txt").write_text(f"loss {seed}\n")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    order, where = list(weights)[::-1] if seed % 2 else list(weights), {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: weights[n] for n in order[s::shards]}, folder / file, metadata={"format": "pt", "shard": str(s)})
        where |= {n: file for n in order[s::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}, indent=2))
    return folder


def snapshot(root: Path) -> dict:
    "Everything below a folder: kind, mode, content."
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        what = os.readlink(path) if stat.S_ISLNK(mode) else hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), stat.S_IMODE(mode), what)
    return found


@pytest.fixture
def pair(tmp_path):
    "Two sound checkpoints, pre/ and post/."
    return write_checkpoint(tmp_path / "pre", 1), write_checkpoint(tmp_path / "post", 2, shards=2)


# ---- every way to call it wrong that the first issue names: name -> (prepare(folder) -> words of the call, what the sentence must say)

def _case(pre=None, post=None, out="out", prepare=None):
    "pre, post: keywords of write_checkpoint; prepare(folder) then spoils something and may return other paths."
    def build(root: Path):
        paths = dict(pre=write_checkpoint(root / "pre", **{"seed": 1, **(pre or {})}), post=write_checkpoint(root / "post", **{"seed": 2, **(post or {})}), out=root / out)
        return paths | ((prepare and prepare(root)) or {})
    return build


def _without(name):
    return {n: t for n, t in tensors(1).items() if n != name}


def _pickled(root):
    (root / "pre" / "model.safetensors").rename(root / "pre" / "pytorch_model.bin")


def _header(data: bytes, change) -> bytes:
    n = int.from_bytes(data[:8], "little")
    text = change(data[8:8 + n].decode()).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n:]


def _edit(file, change):
    def prepare(root): (root / file).write_bytes(change((root / file).read_bytes()))
    return prepare


def _index(change):
    def prepare(root):
        file = root / "post" / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"], root)
        file.write_text(json.dumps(index))
    return prepare


def _outside(names, root):
    (root / "evil.safetensors").write_bytes((root / "post" / "model-00002-of-00002.safetensors").read_bytes())
    for name, file in names.items():
        if file.startswith("model-00002"): names[name] = "../evil.safetensors"


def _absolute(names, root):
    for name in names: names[name] = str(root / "pre" / "model.safetensors")


def _in_two(root):
    first = root / "post" / "model-00001-of-00002.safetensors"
    (root / "post" / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())


def _link(names, root):
    (root / "post" / "model-00002-of-00002.safetensors").rename(root / "elsewhere.safetensors")
    (root / "post" / "model-00002-of-00002.safetensors").symlink_to(root / "elsewhere.safetensors")


def _scaled(name):
    return {**tensors(2), name: tensors(1)[NAME.format(0, "k")]}


def _hole(text):
    return text.replace('"shape":[16,8]', '"shape":[15,8]').replace('"data_offsets":[0,256]', '"data_offsets":[0,240]')


def _fp8(root):
    for name in ("pre", "post"):
        _edit(f"{name}/model.safetensors", lambda data: _header(data, lambda t: t.replace('"F16"', '"I16"')))(root)


def _twice(text):
    name, entry = next((k, v) for k, v in json.loads(text).items() if k != "__metadata__")
    return text.rstrip()[:-1] + f',"{name}":{json.dumps(entry)}}}'


Q1 = NAME.format(1, "q")
BIG = (1 << 60).to_bytes(8, "little")
BAD = {
    "no such pre": (_case(prepare=lambda r: dict(pre=r / "nowhere")), "no folder"),
    "no such post": (_case(prepare=lambda r: dict(post=r / "nowhere")), "no folder"),
    "a file, not a folder": (_case(prepare=lambda r: dict(pre=r / "pre" / "model.safetensors")), "is a file"),
    "no config": (_case(prepare=lambda r: (r / "pre" / "config.json").unlink()), "no config.json"),
    "broken config": (_case(prepare=lambda r: (r / "post" / "config.json").write_text("{") and None), "not valid JSON"),
    "config is a list": (_case(prepare=lambda r: (r / "post" / "config.json").write_text("[]") and None), "no object"),
    "no weights": (_case(prepare=lambda r: (r / "post" / "model.safetensors").unlink()), "no model.safetensors"),
    "no softmax layer": (_case(*[dict(config=hypenet_config(mixer_types=["lightning-attn"] * 4))] * 2), "no softmax layer"),
    "unknown family": (_case(*[dict(config=hypenet_config(model_type="llama", architectures=["LlamaForCausalLM"]))] * 2), "not a known family"),
    "unknown kind of layer": (_case(*[dict(config=hypenet_config(model_type="jamba2", architectures=["JetNemotronForCausalLM"], layer_types=["attn", "mamba2", "attn", "attn"]))] * 2), "unknown kind of layer mamba2"),
    "too few kinds": (_case(*[dict(config=hypenet_config(mixer_types=["attn"]))] * 2), "names 1 layers and num_hidden_layers says 4"),
    "kinds are a word": (_case(*[dict(config=hypenet_config(mixer_types="attn"))] * 2), "must be a list"),
    "configs differ: heads": (_case(pre=dict(config=hypenet_config(num_attention_heads=1, head_dim=8))), "num_attention_heads differs: 1 in pre, 2 in post"),
    "configs differ: log scale": (_case(pre=dict(config=hypenet_config(attn_logits_scaling="hype 500"))), "attn_logits_scaling differs"),
    "configs differ: rope": (_case(post=dict(config=hypenet_config(attn_use_rope=False))), "attn_use_rope differs"),
    "configs differ: kinds": (_case(pre=dict(config=hypenet_config(mixer_types=KINDS[::-1][1:] + ["attn"]))), "kinds of layers differ"),
    "configs differ: family": (_case(pre=dict(config=hypenet_config(model_type="jet_nemotron", architectures=[], layer_types=["attn"] * 4))), "jet_nemotron"),
    "shapes differ": (_case(pre=dict(weights=tensors(1, hidden=6))), "has shape [8, 6] in pre and [8, 8] in post"),
    "dtypes differ": (_case(pre=dict(dtype="float32")), "has dtype F32 in pre and BF16 in post"),
    "missing tensor in pre": (_case(pre=dict(weights=_without(Q1))), f"pre has no tensor {Q1}"),
    "missing tensor in post": (_case(post=dict(weights=_without(NAME.format(2, "k")))), "post has no tensor"),
    "quantized": (_case(dict(dtype="float16"), dict(dtype="float16"), prepare=_fp8), "stored as I16"),
    "output exists": (_case(prepare=lambda r: (r / "out").mkdir()), "exists"),
    "output is a file": (_case(prepare=lambda r: (r / "out").write_text("mine") and None), "exists"),
    "output is a link to nothing": (_case(prepare=lambda r: (r / "out").symlink_to(r / "gone")), "exists"),
    "output is pre": (_case(out="pre"), "is one of the inputs"),
    "output is post, through a link": (_case(prepare=lambda r: (r / "link").symlink_to(r / "post") or dict(out=r / "link")), "is one of the inputs"),
    "output inside pre": (_case(out="pre/out"), "inside the input"),
    "output inside post, through a link": (_case(prepare=lambda r: (r / "link").symlink_to(r / "post") or dict(out=r / "link" / "out")), "inside the input"),
    "output above the inputs": (_case(out="."), "above the input"),
    "no place for the output": (_case(out="a/b/out"), "no folder"),
    "pre and post the same": (_case(prepare=lambda r: (r / "link").symlink_to(r / "post") or dict(pre=r / "link")), "the same folder"),
    "adapter": (_case(prepare=lambda r: (r / "post" / "adapter_config.json").write_text("{}") and None), "merge_and_unload"),
    "pickled": (_case(prepare=_pickled), "save_pretrained"),
    "missing shard": (_case(post=dict(shards=2), prepare=lambda r: (r / "post" / "model-00002-of-00002.safetensors").unlink()), "lacks its shard"),
    "shard outside, by ..": (_case(post=dict(shards=2), prepare=_index(_outside)), "no file of this folder"),
    "shard outside, absolute": (_case(post=dict(shards=2), prepare=_index(_absolute)), "no file of this folder"),
    "tensor in two shards": (_case(post=dict(shards=2), prepare=_in_two), "stands in"),
    "broken index": (_case(post=dict(shards=2), prepare=lambda r: (r / "post" / "model.safetensors.index.json").write_text("[1]") and None), "cannot be read"),
    "truncated": (_case(prepare=_edit("post/model.safetensors", lambda d: d[:-1])), "not a sound safetensors file"),
    "empty file": (_case(prepare=_edit("pre/model.safetensors", lambda d: b"")), "not a sound safetensors file"),
    "key twice": (_case(prepare=_edit("pre/model.safetensors", lambda d: _header(d, _twice))), "twice in the header"),
    "shard outside, by a link": (_case(post=dict(shards=2), prepare=_index(_link)), "leads out of the folder"),
    "shard outside, by a folder": (_case(post=dict(shards=2), prepare=_index(lambda names, root: names.update(dict.fromkeys(names, "logs/x.safetensors")))), "no file of this folder"),
    "scales beside the weights": (_case(post=dict(weights=_scaled(Q1 + "_scale_inv"))), "is quantized"),
    "quantized under other names": (_case(post=dict(weights={n.replace("_proj.weight", "_proj.qweight"): t for n, t in tensors(2).items()})), "are quantized"),
    "the same bytes": (_case(post=dict(seed=1)), "the same bytes in all 4 tensors"),
    "header cut off": (_case(prepare=_edit("post/model.safetensors", lambda d: d[:40])), "not a sound safetensors file"),
    "seven bytes": (_case(prepare=_edit("post/model.safetensors", lambda d: d[:7])), "not a sound safetensors file"),
    "header without end": (_case(prepare=_edit("post/model.safetensors", lambda d: BIG + d[8:])), "not a sound safetensors file"),
    "header is a list": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: "[]"))), "not a sound safetensors file"),
    "header is not UTF-8": (_case(prepare=_edit("post/model.safetensors", lambda d: d[:20] + b"\xff" + d[21:])), "not a sound safetensors file"),
    "header of a thousand brackets": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: '{"a":' + "[" * 100_000))), "not a sound safetensors file"),
    "trailing bytes": (_case(prepare=_edit("post/model.safetensors", lambda d: d + b"x")), "not a sound safetensors file"),
    "a hole": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, _hole))), "not a sound safetensors file"),
    "negative offsets": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: t.replace('"data_offsets":[0,', '"data_offsets":[-1,')))), "not a sound safetensors file"),
    "offsets out of range": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: t.replace('"data_offsets":[0,256', '"data_offsets":[0,25600')))), "not a sound safetensors file"),
    "unknown dtype": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: t.replace('"BF16"', '"BF17"')))), "not a sound safetensors file"),
    "shape that does not fit": (_case(prepare=_edit("post/model.safetensors", lambda d: _header(d, lambda t: t.replace('"shape":[16,8]', '"shape":[16,9]')))), "not a sound safetensors file"),
    "offsets overlap": (_case(prepare=_edit("pre/model.safetensors", lambda d: _header(d, lambda t: t.replace('"data_offsets":[256,', '"data_offsets":[240,')))), "not a sound safetensors file"),
}


@pytest.fixture(params=BAD)
def bad(request, tmp_path):
    "A wrong call: its paths as a dict, and a piece of the sentence that must come back."
    build, sentence = BAD[request.param]
    return build(tmp_path), sentence


# ---- a tiny hybrid that runs, its tokenizer, and something to learn

def small_tokenizer(size: int = 1000):
    from qkrestore_nb.prose import small_tokenizer
    return small_tokenizer(size, 20000)


def write_sums(file: Path, n: int = 200):
    rng = random.Random(0)
    with open(file, "w") as f:
        for _ in range(n):
            a, b = rng.randint(1, 50), rng.randint(1, 50)
            f.write(json.dumps(dict(prompt=f"{a} and {b}?", completion=f"{a} + {b} = {a + b}. " * rng.randint(1, 3))) + "\n")


def small_hybrid():
    "Four layers, two of them softmax layers, 1,000 pieces of English, the head tied to the embedding, weights large enough that it says different things."
    from transformers import set_seed
    from qkrestore_nb.hypenet import HypeNetConfig, HypeNetForCausalLM
    set_seed(0)
    return HypeNetForCausalLM(HypeNetConfig.preset("2B", vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                                                   lightning_nh=2, lightning_nkv=2, lightning_head_dim=32, mixer_types=["lightning-attn", "attn"] * 2, initializer_range=.2)).eval()


@pytest.fixture(scope="session")
def tokenizer(): return small_tokenizer()


@pytest.fixture(scope="session")
def model(): return small_hybrid()


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    "The tiny hybrid as a checkpoint."
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
