"The script for several GPUs: what it makes of its jobs' records, and its jobs, tiny, on two processes of a CPU."
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "speed" / "many_gpus.py"


@pytest.fixture(scope="module")
def many():
    spec = importlib.util.spec_from_file_location("many_gpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs_of_a_wave_have_cards_of_their_own(many):
    for wave in many.WAVES:
        cards = [c for j in wave for c in j["cards"]]
        assert len(set(cards)) == len(cards) and set(cards) <= set(many.CARDS)
    names = [j["name"] for wave in many.WAVES for j in wave]
    assert len(set(names)) == len(names)
    assert all(j["rows"] % len(j["cards"]) == 0 for wave in many.WAVES for j in wave if "rows" in j)
    assert all(len(j["cards"]) <= 2 and j["T"] <= 512 * 64 for wave in many.smoke(many.WAVES) for j in wave)


def record(many, name, seconds, losses=(3., 2.), **more):
    found = next(j for wave in many.WAVES for j in wave if j["name"] == name)
    peak = [10.] * len(found["cards"])
    return dict(job=found, wall_s=9., seconds=seconds, losses=list(losses), peak_gpu_gb=peak, needs_gb=12., **more)


def test_records_beside_each_other(many, tmp_path):
    "Ratios of tokens a second and of reading times, losses beside those of one card; what failed is left out."
    jobs = {"2b_8k_1": record(many, "2b_8k_1", [9., 4., 4.]),
            "2b_8k_2": record(many, "2b_8k_2", [9., 2., 2.], (3., 2.25)),
            "2b_8k_4": record(many, "2b_8k_4", [9., 1., 1.]) | dict(error="it died"),
            "read_2b_256k_1": record(many, "read_2b_256k_1", [6., 5.]),
            "read_2b_256k_4": record(many, "read_2b_256k_4", [2.5, 2.], difference=.01)}
    many.split(jobs | dict(versions={}, device="a card"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fsdp_2b_8k.json", "long_2b_256k.json"]
    def written(name): return json.loads((tmp_path / f"{name}.json").read_text())

    tuned, read = written("fsdp_2b_8k"), written("long_2b_256k")
    assert tuned["ratio"] == {"2": 2.} and tuned["tokens_per_s"] == 8 * 8192 / 2 and tuned["cards"] == 2
    assert tuned["largest_difference_of_losses"] == {"2": .25} and len(tuned["rows"]) == 2
    assert read["ratio"] == 2.5 and read["one_card"]["seconds"] == [6., 5.] and read["difference"] == .01


@pytest.mark.slow
def test_reading_and_fine_tuning_in_small(tmp_path):
    names = ["read_2b_256k_1", "read_2b_256k_4", "2b_8k_dies"]
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--profile", "smoke", "--only", *names]
    env = os.environ | dict(PYTHONPATH=str(SCRIPT.parents[2]), BIG=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    found = json.loads((tmp_path / "many_gpus.json").read_text())
    assert done.returncode == 0 and not any(found[n].get("error") for n in names), done.stdout[-3000:]
    assert found["read_2b_256k_4"]["difference"] < .05 and found["read_2b_256k_4"]["same_best"]
    assert found["2b_8k_dies"]["states_after_death"] == ["state-3"] and len(found["2b_8k_dies"]["losses"]) == 6
