"One text read by several processes: the answer of one, what is refused, and a process that dies."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_hybrid

from qkrestore_nb import long_reading as lr
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.hypenet import CACHE, HypeNetConfig, prefill
from qkrestore_nb.linear_attention import decay_slopes, linear_attention_recurrent


def text(T: int, vocabulary: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, T), generator=torch.Generator().manual_seed(T))


def conv_hybrid():
    "The tiny hybrid with short convolutions before its linear layers."
    from qkrestore_nb.hypenet import HypeNetForCausalLM
    config = small_hybrid().config.to_dict() | dict(lightning_use_short_conv=True, num_key_value_heads=2)
    torch.manual_seed(1)
    return HypeNetForCausalLM(HypeNetConfig(**config)).eval()


MODELS = dict(plain=small_hybrid, conv=conv_hybrid)


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5, 2], [1, 30]])
def test_states_of_segments(lengths):
    "Outputs and states of segments read alone, mended, are those of the recurrence, in float64."
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, sum(lengths), 3, 4, generator=g, dtype=torch.float64)
    decay = -decay_slopes(3).double()
    parts = list(zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True))
    alone = [linear_attention_recurrent(*part, decay) for part in parts]
    states = lr.states_before(torch.stack([U for _, U in alone]), lengths, decay)
    whole, end = linear_attention_recurrent(q, k, v, decay)
    o = torch.cat([lr.with_past(o, p[0], S, decay, 99) for (o, _), p, S in zip(alone, parts, states)], 1)
    torch.testing.assert_close(o, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[-1], end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T, cards", [(16, 2), (1001, 4), (262144, 4), (31, 3)])
def test_segments_are_the_text(T, cards):
    found = lr.segments(T, cards)
    assert [a for a, _ in found] == [0] + [b for _, b in found[:-1]] and found[-1][1] == T
    assert len({b - a for a, b in found[:-1]}) == 1 and len(found) == 2 * cards
    assert sorted(j for r in range(cards) for j in lr.mine(r, cards)) == list(range(2 * cards))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("T", [9, 64, 1001])
def test_one_process_reads_its_two_segments(name, T):
    from transformers import StaticCache
    model, ids = MODELS[name](), text(T)
    cache = StaticCache(config=model.config, max_cache_len=T + 8)
    wanted, other = prefill(model, ids, 400)
    torch.testing.assert_close(lr.read_long(model, ids, cache), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): a, b = (model(text(5), use_cache=True, **{CACHE: c}).logits for c in (cache, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part, spoilt", [
    ("with_past", lambda o, *_: o), ("states_before", lambda local, *_: local[[-1, -1, -1]]),
    ("fused_attention", lambda q, k, v, **how: v[:, -q.shape[1]:].repeat_interleave(2, 2))])
def test_this_check_can_fail(monkeypatch, part, spoilt):
    "Without what came before it, or with another's state or values, the answer is another."
    model, ids = small_hybrid(), text(64)
    wanted, _ = prefill(model, ids)
    monkeypatch.setattr(lr, part, spoilt)
    assert not torch.allclose(lr.read_long(model, ids), wanted, rtol=1e-2, atol=1e-2)


# ---- several processes

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_long_reading import MODELS, text
from qkrestore_nb import long_reading as lr
from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.hypenet import CACHE
from transformers import DynamicCache
name, T, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, model = dist.get_rank(), MODELS[name]()
ids = text(T)
if how == "differs" and rank == 1: ids[0, 3] += 1
if how == "dies" and rank == 1:
    calls, ask = [], lr.in_order
    def in_order(own):
        calls.append(1)
        if len(calls) == 3: os._exit(9)
        return ask(own)
    lr.in_order = in_order
cache = DynamicCache(config=model.config) if rank == 0 else None
try: logits = lr.read_long(model, ids, cache)
except CheckpointError as e:
    print("SAYS", rank, e, flush=True)
    os._exit(2)
if rank == 0:
    with torch.no_grad(): then = model(text(5), use_cache=True, **{{CACHE: cache}}).logits
    torch.save(dict(logits=logits, then=then), sys.argv[4])
dist.destroy_process_group()
"""


def launch(folder: Path, n: int, name: str, T: int, how: str = "reads"):
    (folder / "read.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), str(folder / "read.py")]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(lr.__file__).parent.parent))
    command = [*start, name, str(T), how, str(folder / "out.pt")]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("n, name, T", [(2, "plain", 1001), (2, "conv", 77), (4, "conv", 1001), (4, "plain", 64)])
def test_processes_give_the_answer_of_one(tmp_path, n, name, T):
    model, ids = MODELS[name](), text(T)
    wanted, cache = prefill(model, ids)
    with torch.no_grad(): then = model(text(5), use_cache=True, **{CACHE: cache}).logits
    done = launch(tmp_path, n, name, T)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["then"], then, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_processes_that_disagree(tmp_path):
    done = launch(tmp_path, 2, "plain", 64, "differs")
    said = [line for line in done.stdout.splitlines() if "SAYS" in line]
    assert done.returncode and said and all("the processes were given different texts" in line for line in said)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.slow
def test_a_process_that_dies(tmp_path):
    "Without torchrun, which would stop the other one at once: it says why it stops."
    (tmp_path / "read.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(lr.__file__).parent.parent), WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, str(tmp_path / "read.py"), "plain", "64", "dies", str(tmp_path / "out.pt")]
    both = [subprocess.Popen(command, env=env | dict(RANK=str(r)), stdout=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [2, 9] and "another process of this reading has ended" in said[0], said
    assert not (tmp_path / "out.pt").exists()


# ---- what is refused, in one sentence

def test_refusals(monkeypatch):
    model = small_hybrid()
    said = []
    def refused(match, *given):
        with pytest.raises(CheckpointError, match=match) as e: lr.read_long(*given)
        said.append(str(e.value))
    refused("read them one after the other", model, text(20).expand(2, -1))
    refused("start fewer processes", model, text(5))
    with monkeypatch.context() as m:
        m.setattr("qkrestore_nb.scale.room_gb", lambda device: 1e-6)
        refused("20,000 tokens on 1 cards take .* GB on each beside the weights, .*: 2 cards take", model, text(20000))
    with monkeypatch.context() as m:
        m.setattr(lr, "_processes", lambda: (1, 2))
        refused("on process 0", model, text(64), object())
    with monkeypatch.context() as m:
        m.setattr(model.config, "model_type", "qwen3_next", raising=False)
        refused("not qwen3_next's: read on one card", model, text(64))
    assert len(said) == 5 and all(len(s) <= 160 and "\n" not in s for s in said), said


def test_needs_of_a_card():
    nine = HypeNetConfig.preset("9B")
    gb = lambda *a, **k: lr.reading_needs(nine, *a, **k)["total_gb"]
    assert gb(262144, 1) > gb(262144, 4) > gb(262144, 8) > 17.7 and gb(262144, 4, keep=True) > gb(262144, 4) + 9
    for file in (Path(__file__).parent.parent / "results" / "scale").glob("long_*.json"):  # never more than computed
        run = json.loads(file.read_text())
        assert .5 < run["peak_gpu_gb"] / run["needs_gb"] < 1, file.name
