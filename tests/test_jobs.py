"The one job runner of benchmarks/, with short commands of the shell: order, GPUs, exit status, logs, time; and the tree of scripts."
import ast
import importlib.util
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("jobs", BENCHMARKS / "jobs.py")
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)


def sh(text: str) -> list[str]: return ["sh", "-c", text]


@pytest.fixture
def two(monkeypatch): monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")


@pytest.fixture
def one(monkeypatch): monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_one_after_another_in_the_order_given(one, tmp_path):
    names = [f"job{i}" for i in (3, 1, 4, 2)]
    ended = jobs.run_jobs({n: sh(f"echo {n} >> {tmp_path}/order") for n in names}, tmp_path / "logs")
    assert (tmp_path / "order").read_text().split() == names and ended == dict.fromkeys(names, 0) and list(ended) == names


def test_side_by_side_on_every_gpu(two, tmp_path):
    "Two a GPU: four begin before any has ended, each knows its GPU, the fifth takes the first place that is free."
    wait = f"echo $CUDA_VISIBLE_DEVICES; touch {tmp_path}/begun.$0; i=0; while [ $(ls {tmp_path}/begun.* | wc -l) -lt 4 ] && [ $i -lt 100 ]; do sleep .05; i=$((i+1)); done; [ $i -lt 100 ]"
    ended = jobs.run_jobs({f"job{i}": [*sh(wait), str(i)] for i in range(5)}, tmp_path / "logs", per_gpu=2)
    assert ended == {f"job{i}": 0 for i in range(5)}
    cards = [(tmp_path / "logs" / f"job{i}.log").read_text().strip() for i in range(5)]
    assert sorted(cards[:4]) == ["3", "3", "5", "5"] and cards[4] in ("3", "5")


def test_a_job_that_fails_is_told_and_stops_nobody(one, tmp_path, capfd):
    ended = jobs.run_jobs(dict(bad=sh("echo wrong >&2; exit 7"), good=sh("echo right")), tmp_path / "logs")
    assert ended == dict(bad=7, good=0)
    assert "bad ended with 7 after" in capfd.readouterr().out and (tmp_path / "logs" / "bad.log").read_text() == "wrong\n"


def test_what_still_runs_is_stopped_in_time_and_goes_on_later(one, tmp_path, capfd):
    "A command that takes up where it was; what was not begun is not begun. Logs are added to."
    count = f"touch {tmp_path}/$0; while [ $(wc -l < {tmp_path}/$0) -lt 20 ]; do echo x >> {tmp_path}/$0; echo said; sleep .1; done"
    work, then = {n: [*sh(count), n] for n in ("first", "second")}, time.monotonic()
    assert jobs.run_jobs(work, tmp_path / "logs", minutes=1 / 60) == dict(first=None, second=None)
    assert time.monotonic() - then < 4 and "first stopped in time" in capfd.readouterr().out
    before = (tmp_path / "first").read_text().count("x")
    assert 2 < before < 20 and not (tmp_path / "second").exists()
    time.sleep(.5)
    assert (tmp_path / "first").read_text().count("x") == before  # it is really stopped
    (tmp_path / "second").write_text("x\n" * 18)
    assert jobs.run_jobs(work, tmp_path / "logs", minutes=1) == dict(first=0, second=0)
    assert [(tmp_path / n).read_text().count("x") for n in work] == [20, 20]
    assert (tmp_path / "logs" / "first.log").read_text().count("said") == 20


def test_no_gpu_is_one_place(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), dict(cuda=type("cuda", (), dict(device_count=staticmethod(lambda: 0))))))
    assert jobs.cards() == [""]
    assert jobs.run_jobs(dict(a=sh("exit 0")), tmp_path / "logs") == dict(a=0)


def test_no_jobs(one, tmp_path): assert jobs.run_jobs({}, tmp_path / "logs") == {}


SCRIPTS = sorted(p for p in BENCHMARKS.rglob("*.py") if p.name != "sitecustomize.py")


def test_the_tree():
    assert {p.parent.name for p in SCRIPTS} == {"benchmarks", "speed", "studies", "checks"}
    assert [p.name for p in SCRIPTS if p.parent == BENCHMARKS] == ["jobs.py"]


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name != "jobs.py"], ids=lambda p: p.stem)
def test_every_script_says_how_it_is_called(path):
    assert f"python {path.relative_to(BENCHMARKS.parent).as_posix()}" in ast.get_docstring(ast.parse(path.read_text()))
