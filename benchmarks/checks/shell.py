"""Foreign commands on a restored HypeNet folder, and what each said.

    python benchmarks/checks/shell.py results/shell.json --mergekit mergekit/bin/mergekit-yaml

None of them imports this package. tests/test_from_the_shell.py asserts the same; this script keeps the words. lm_eval
and trl come with the dev extra, `--mergekit` names a mergekit-yaml of another environment."""
import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
OPEN = """from transformers import AutoModelForCausalLM as A
print(A.from_pretrained('restored', trust_remote_code=True).config.model_type)"""
REWARD = """from transformers import AutoModelForSequenceClassification as A
print(type(A.from_pretrained('restored', trust_remote_code=True, num_labels=1)).__name__)"""
LORA = """from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM as A
model = A.from_pretrained('restored', trust_remote_code=True)
get_peft_model(model, LoraConfig(task_type='CAUSAL_LM'{})).print_trainable_parameters()"""


def commands(mergekit: str | None) -> dict[str, list[str]]:
    "By name; python, lm_eval and trl are those of this environment."
    there, python = Path(sys.executable).parent, [sys.executable, "-c"]
    eval_ = ["--tasks", "sums", "--include_path", "task", "--device", "cpu", "--model", "hf", "--model_args"]
    found = {"AutoModelForCausalLM": [*python, OPEN], "AutoModelForSequenceClassification": [*python, REWARD],
             "peft without target_modules": [*python, LORA.format("")],
             "peft with all-linear": [*python, LORA.format(", target_modules='all-linear'")],
             "lm_eval": [str(there / "lm_eval"), *eval_, "pretrained=restored,trust_remote_code=True"],
             "trl sft": [str(there / "trl"), "sft", "--config", "sft.yaml"]}
    if mergekit:
        merge = [str(Path(mergekit).absolute()), "recipe.yaml"]
        found |= {"mergekit-yaml": [*merge, "merged", "--trust-remote-code"],
                  "mergekit-yaml without trust": [*merge, "refused"]}
    return found


def prepared(folder: Path) -> None:
    "pre, post, restored, data, and the files that the commands read."
    from test_from_the_shell import SFT, TASK
    from test_from_the_shell import folder as fixture

    from qkrestore_nb.hub import mergekit_yaml

    class Factory:
        def mktemp(self, name): return folder

    fixture.__wrapped__(Factory())
    (folder / "task").mkdir()
    (folder / "task" / "sums.yaml").write_text(TASK.format(data=folder / "sums.jsonl"))
    (folder / "sft.yaml").write_text(SFT.format(folder=folder, data=folder / "sums.jsonl"))
    (folder / "recipe.yaml").write_text(mergekit_yaml(folder / "pre", folder / "post"))


def said(words: list[str], folder: Path) -> dict:
    "Exit code, seconds and the last lines of a command, without the folder's name."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= dict(HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", COLUMNS="100")
    then = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    words = [Path(w).name if w.startswith("/") else w for w in words]
    plain = lambda text: [x[:300] for x in text.replace(str(folder), ".").splitlines() if x.strip()]
    out = plain(done.stdout)[-8:]
    row = dict(command=shlex.join(words), code=done.returncode, seconds=round(time.perf_counter() - then, 1), out=out)
    return row | (dict(error=plain(done.stderr)[-2:]) if done.returncode else {})


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("out", type=Path)
    ask.add_argument("--mergekit")
    args = ask.parse_args()
    from qkrestore_nb.core import provenance
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        rows = {name: said(words, Path(folder)) for name, words in commands(args.mergekit).items()}
    note = provenance(0) | dict(wall_s=round(sum(r["seconds"] for r in rows.values()), 1), commands=rows)
    args.out.write_text(json.dumps(note, indent=1) + "\n")
    for name, r in rows.items(): print(f"{r['code']}  {name}: {(r.get('error') or r['out'] or [''])[-1][:120]}")


if __name__ == "__main__": main()
