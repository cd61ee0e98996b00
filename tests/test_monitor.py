"""RecallMonitor in transformers' Trainer, TRL's SFTTrainer and loops of one's own; with adapters, packed rows and
shards; and all it refuses."""

import json
import math
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_hybrid, small_tokenizer
from test_diagnostics import Unhookable, hybrid, llama, text
from transformers import Trainer, TrainerCallback, TrainingArguments

import qkrestore_nb
from qkrestore_nb.diagnostics import gradient_range
from qkrestore_nb.monitor import Probe, QKDrift, RecallMonitor, probed, prose_probe
from qkrestore_nb.recall import recall_test, score


class Copy(torch.utils.data.Dataset):
    "Rows for the Trainer: random tokens."

    def __init__(self, n=16, T=24):
        self.ids = torch.randint(1, 500, (n, T), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return dict(input_ids=self.ids[i], labels=self.ids[i])


class Reported(TrainerCallback):
    "Stands where an integration of report_to stands, and keeps what it is given."

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def asked(n=4, T=40, vocab=500, seed=0):
    "A probe of random tokens whose answers are the last three."
    ids = torch.randint(1, vocab, (n, T), generator=torch.Generator().manual_seed(seed))
    return dict(ids=ids, ask=np.tile(np.arange(T - 3, T), (n, 1, 1)))


def known(model, n=4, T=40):
    "A probe that the model answers: it writes the answers itself."
    batch = asked(n, T)
    with torch.no_grad():
        for t in range(T - 3, T):
            batch["ids"][:, t] = model(batch["ids"][:, :t], use_cache=False).logits[:, -1].argmax(-1)
    return batch


def arguments(folder, **fields):
    return TrainingArguments(
        str(folder),
        **dict(
            max_steps=6,
            per_device_train_batch_size=4,
            report_to=[],
            logging_steps=3,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-3,
        )
        | fields,
    )


def trained(monitor, folder, model=None, callbacks=(), tokenizer=None, **fields):
    trainer = Trainer(
        model or small_hybrid(),
        arguments(folder, **fields),
        train_dataset=Copy(),
        callbacks=[*callbacks, *([monitor] if monitor else [])],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def test_prose_probe(tokenizer):
    probe = prose_probe(tokenizer, 600, 3)
    assert len(probe.asks) == 3 and 400 < probe.ids.shape[1] <= 600
    for row, at in probe.asks:
        said = tokenizer.decode(probe.ids[row, at]).strip()
        assert (
            said.isdigit()
            and len(said) == 7
            and tokenizer.decode(probe.ids[row, : at[0]]).rstrip().endswith("mentioned in the provided text is")
        )
    assert (
        tokenizer.decode(probe.ids[0]).count(tokenizer.decode(probe.ids[0, probe.asks[0][1]]).strip()) >= 2
    )  # the needle holds it, too


def test_a_look_is_exact():
    model = small_hybrid()
    good, bad = known(model), asked()
    both = Probe(torch.cat([good["ids"], bad["ids"]]), [(i, torch.arange(37, 40)) for i in range(8)])
    recall, loss = probed(model, both, tokens=80)
    assert recall == probed(model, both)[0] == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        logits = model(both.ids, use_cache=False).logits[:, 36:39].float()
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), both.ids[:, 37:].flatten()).item(), rel=1e-5
    )
    test = recall_test("MK", 4, 200, 2)
    mine = hybrid(vocab_size=512)
    assert probed(mine, Probe.of(test))[0] == score(mine, test).exact.mean()


def test_mode_and_weights_are_left_alone():
    model = small_hybrid().train()
    model.model.layers[0].eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    monitor = RecallMonitor(probe=asked(), gradients=text(1, 32))
    monitor.start(model), monitor.look(model, 50)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


def test_trainer_logs_and_reports(tmp_path):
    seen, monitor, model = Reported(), RecallMonitor(every=2, probe=asked(), gradients=text(2, 32)), small_hybrid()
    trainer = trained(monitor, tmp_path, model, [seen])
    assert [r.step for r in monitor.readings] == [0, 2, 4, 6]
    told = [(step, logs) for step, logs in seen.logs if "recall/exact" in logs]
    assert [step for step, _ in told] == [0, 2, 4, 6] and {
        "recall/loss",
        "drift/q",
        "drift/k",
        "gradient/mean_distance",
        "monitor/seconds",
    } <= told[1][1].keys()
    assert all("loss" not in logs for _, logs in told)
    assert [step for step, logs in seen.logs if "loss" in logs] == [3, 6], (
        "the loss that was due at step 6 must not get lost"
    )
    assert [e["step"] for e in trainer.state.log_history if "drift/q" in e] == [0, 2, 4, 6]
    assert monitor.readings[0].drift == dict(q=0, k=0) and monitor.readings[-1].drift["q"] > 0
    weights = small_hybrid()
    moved = math.hypot(
        *(
            (model.model.layers[i].self_attn.q_proj.weight - weights.model.layers[i].self_attn.q_proj.weight)
            .norm()
            .item()
            for i in (1, 3)
        )
    )
    size = math.hypot(*(weights.model.layers[i].self_attn.q_proj.weight.norm().item() for i in (1, 3)))
    assert monitor.readings[-1].drift["q"] == pytest.approx(moved / size, rel=1e-4)
    assert monitor.readings[-1].gradient["mean_distance"] == pytest.approx(
        gradient_range(model, text(2, 32)).summary(samples=2)["mean"][0], rel=1e-4
    )
    assert 0 < monitor.overhead() < 1


def test_training_is_the_same_with_and_without(tmp_path):
    models = [small_hybrid(), small_hybrid()]
    trained(RecallMonitor(every=1, probe=asked()), tmp_path / "a", models[0])
    trained(None, tmp_path / "b", models[1])
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


def test_what_report_to_names_gets_it(tmp_path, monkeypatch):
    "An integration that the Trainer makes itself from report_to."
    from transformers.integrations import integration_utils

    made = []

    class Service(Reported):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "clearml", Service)
    trained(RecallMonitor(every=2, probe=asked()), tmp_path, report_to=["clearml"])
    assert [step for step, logs in made[0].logs if "recall/exact" in logs] == [0, 2, 4, 6]


def test_tensorboard_gets_it(tmp_path):
    pytest.importorskip("tensorboard")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "runs")
    try:
        trained(RecallMonitor(every=2, probe=asked()), tmp_path, report_to=["tensorboard"])
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events*")).parent))
    events.Reload()
    assert [e.step for e in events.Scalars("train/recall/exact")] == [0, 2, 4, 6]


def test_warns_and_goes_on(tmp_path):
    model = small_hybrid()
    monitor = RecallMonitor(every=2, probe=known(model))
    with pytest.warns(UserWarning, match=r"recall has fallen from 100% to \d+%, below 80% of the start") as told:
        trainer = trained(monitor, tmp_path, model, learning_rate=0.05)
    assert monitor.fallen and trainer.state.global_step == 6 and sum("has fallen" in str(w.message) for w in told) == 1
    calm = RecallMonitor(every=2, probe=known(small_hybrid()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(calm, tmp_path, learning_rate=0.0)
    assert not calm.fallen and calm.readings[-1].of_start == 1


def test_stops(tmp_path):
    model = small_hybrid()
    monitor = RecallMonitor(every=2, probe=known(model), on_fall="stop")
    with pytest.warns(UserWarning, match="has fallen"):
        trainer = trained(monitor, tmp_path, model, learning_rate=0.05)
    assert trainer.state.global_step == monitor.readings[-1].step < 6


class Spoil(TrainerCallback):
    "Recall falls between steps 4 and 5."

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)


def test_keeps_the_last_checkpoint_before_the_fall(tmp_path):
    model = small_hybrid()
    monitor = RecallMonitor(every=3, probe=known(model), keep=True)
    with pytest.warns(UserWarning, match="has fallen"):
        trained(
            monitor,
            tmp_path,
            model,
            [Spoil()],
            learning_rate=0.0,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
            max_steps=8,
        )
    assert (
        sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["checkpoint-8", "recall-4"]
        and monitor.kept == tmp_path / "recall-4"
    )
    from qkrestore_nb.hypenet import HypeNetForCausalLM

    assert probed(HypeNetForCausalLM.from_pretrained(monitor.kept), monitor.probe)[0] == 1
    assert [r.step for r in monitor.readings] == [0, 2, 3, 4, 6]


def test_a_run_that_goes_on_compares_with_its_true_start(tmp_path):
    model = small_hybrid()
    probe = known(model)
    trained(
        RecallMonitor(every=2, probe=probe),
        tmp_path,
        model,
        learning_rate=0.0,
        save_strategy="steps",
        save_steps=4,
        max_steps=4,
    )
    spoilt = Trainer(
        small_hybrid(),
        arguments(tmp_path, max_steps=6),
        train_dataset=Copy(),
        callbacks=[monitor := RecallMonitor(every=2, probe=asked())],
    )
    with pytest.warns(UserWarning, match="fallen from 100% to 0%"):
        spoilt.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert monitor.readings[0].recall == 1 and monitor.readings[-1].of_start == 0


def test_trl_packed_in_the_trainer_s_own_tokenizer(tmp_path, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    seen, monitor = Reported(), RecallMonitor(every=2, length=700, haystacks=2)
    data = Dataset.from_list([dict(prompt=f"{a} and {a}?", completion=f" {a} + {a} = {2 * a}.") for a in range(64)])
    config = SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        max_length=64,
        packing=True,
        padding_free=False,
        report_to=[],
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        learning_rate=1e-3,
    )
    with pytest.warns(UserWarning, match="recall is 0 at the start"):
        SFTTrainer(
            small_hybrid(), config, train_dataset=data, processing_class=tokenizer, callbacks=[seen, monitor]
        ).train()
    assert [r.step for r in monitor.readings] == [0, 2, 4] and monitor.probe.ids.shape[1] <= 700
    assert [step for step, logs in seen.logs if "recall/loss" in logs] == [0, 2, 4]
    own = [logs for step, logs in seen.logs if "loss" in logs]
    assert len(own) == 2 and all("mean_token_accuracy" in logs for logs in own), "TRL's own figures stay TRL's"


def test_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = small_hybrid()
    model = get_peft_model(deepcopy(plain), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    monitor = RecallMonitor(every=3, probe=asked())
    trained(monitor, tmp_path, model, learning_rate=0.05)
    merged = deepcopy(model).merge_and_unload()
    assert monitor.readings[0].drift["q"] == 0 and monitor.readings[-1].drift["k"] == 0
    assert (
        monitor.readings[-1].drift["q"] == pytest.approx(QKDrift(plain)(merged)["q"], rel=1e-3)
        and monitor.readings[-1].drift["q"] > 0
    )


def test_a_loop_of_one_s_own():
    model = small_hybrid()
    opt, monitor, rows = torch.optim.SGD(model.parameters(), 30.0), RecallMonitor(every=2, probe=known(model)), Copy()
    first = monitor.start(model)
    assert first.recall == 1 and first.step == 0
    with pytest.warns(UserWarning, match="has fallen"):
        for step in range(1, 6):
            model(rows.ids[:4], labels=rows.ids[:4]).loss.backward()
            opt.step(), opt.zero_grad()
            reading = monitor.look(model, step)
            assert (reading is None) == bool(step % 2)
            if monitor.fallen:
                break
    assert monitor.fallen and reading.logs()["recall/exact"] < 0.8
    recall, loss, moved = monitor.plot()
    assert [len(ax.lines) for ax in (recall, loss, moved)] == [2, 1, 2] and list(recall.lines[0].get_xdata()) == [
        r.step for r in monitor.readings
    ]


SHARDED = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from conftest import small_hybrid
from test_monitor import Copy, asked, known
from qkrestore_nb.monitor import RecallMonitor
dist.init_process_group("gloo")
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (2,))
model = small_hybrid()
probe, rows = known(model), Copy()
for layer in model.model.layers: fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert hasattr(model.model.layers[1].self_attn.q_proj.weight, "full_tensor")
opt, monitor = torch.optim.SGD(model.parameters(), 1.), RecallMonitor(every=1, probe=probe, share=.01)
monitor.start(model)
model(input_ids=rows.ids[:4], labels=rows.ids[:4]).loss.backward()
opt.step()
r = monitor.look(model, 1)
try: RecallMonitor(probe=probe, gradients=rows.ids).start(model)
except ValueError as e: refused = str(e)
seen = dict(rank=dist.get_rank(), first=monitor.readings[0].recall, recall=r.recall, loss=r.loss, drift=r.drift)
open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w").write(json.dumps(seen | dict(refused=refused)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_by_fsdp2(tmp_path):
    "Two processes that hold half of each weight see what one process with whole weights sees."
    (tmp_path / "run.py").write_text(SHARDED)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(qkrestore_nb.__file__).parent.parent))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
            str(tmp_path / "run.py"),
            str(Path(__file__).parent),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
    model = small_hybrid()
    monitor, rows = RecallMonitor(every=1, probe=known(model), share=0.01), Copy()
    monitor.start(model)
    model(input_ids=rows.ids[:4], labels=rows.ids[:4]).loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    r = monitor.look(model, 1)
    assert {s["rank"] for s in seen} == {0, 1}
    for s in seen:
        assert s["first"] == 1 and s["recall"] == r.recall and s["loss"] == pytest.approx(r.loss, rel=1e-3)
        assert s["drift"] == pytest.approx(r.drift, rel=1e-3) and r.drift["q"] > 0 and "sharded" in s["refused"]


def _refused(tmp_path, monitor, **fields):
    return lambda: trained(monitor, tmp_path, **fields)


def _unspelling():
    tokenizer = small_tokenizer(300)
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("4", "")
    return tokenizer


class Flat(torch.nn.Module):
    "Weights as FSDP1 leaves them."

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.q_proj.weight = torch.nn.Parameter(torch.zeros(4))


def _broken():
    model = small_hybrid()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    return model


WRONG = dict(
    not_finite=(lambda p: trained(RecallMonitor(probe=asked()), p, model=_broken()), "not finite"),
    not_hooked=(
        lambda p: RecallMonitor(probe=asked(vocab=64), gradients=text(1, 16), drift=False).start(Unhookable()),
        "nothing can be recorded",
    ),
    masked=(
        lambda p: trained(
            RecallMonitor(probe=asked(), gradients=dict(input_ids=text(1, 16), labels=torch.full((1, 16), -100))), p
        ),
        "every label is masked",
    ),
    no_tokenizer=(lambda p: trained(RecallMonitor(), p), "no tokenizer to build haystacks with"),
    positions=(
        lambda p: trained(
            RecallMonitor(length=5000), p, model=llama(max_position_embeddings=4096), tokenizer=small_tokenizer()
        ),
        "5000 tokens and the model 4096 positions",
    ),
    own_positions=(
        lambda p: trained(RecallMonitor(probe=asked(T=300)), p, model=llama(max_position_embeddings=256)),
        "300 tokens and the model 256 positions",
    ),
    no_softmax=(
        lambda p: trained(RecallMonitor(probe=asked()), p, model=hybrid(["lightning-attn"] * 2, vocab_size=500)),
        "no softmax layer",
    ),
    spelling=(lambda p: trained(RecallMonitor(), p, tokenizer=_unspelling()), "cannot spell it"),
    too_short=(
        lambda p: trained(RecallMonitor(length=100), p, tokenizer=small_tokenizer()),
        "does not fit into 100 tokens",
    ),
    flat=(lambda p: QKDrift(Flat()), "quantized or flattened"),
    no_names=(lambda p: QKDrift(torch.nn.Linear(2, 2)), "no q_proj and k_proj"),
    every=(lambda p: RecallMonitor(every=0), "at least 1"),
    share=(lambda p: RecallMonitor(share=0), "above 0 and at most 1"),
    word=(lambda p: RecallMonitor(on_fall="cry"), "choose warn or stop"),
    kind=(lambda p: trained(RecallMonitor(kind="S2"), p, tokenizer=small_tokenizer()), "no needle test in prose"),
    not_started=(lambda p: RecallMonitor(probe=asked()).look(small_hybrid(), 50), "call start"),
)


@pytest.mark.parametrize("name", WRONG)
def test_errors_before_training_starts(name, tmp_path):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
