"""The core tests under one Python and one choice of versions; a row of results/matrix.json for each call.

    python benchmarks/checks/matrix.py results/matrix.json --versions newest
    python benchmarks/checks/matrix.py results/matrix.json --versions lowest    # that pyproject.toml allows

Installs into a fresh environment with uv, which must be on the path. Not all tests: those of the library's core, which
need no browser, no compiler and no other program. CI runs the rest."""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = ["adapters_hub", "checkpoints", "diagnostics", "families", "hypenet", "hypothesis", "inspection", "moves",
        "note", "pinned", "procrustes", "projections", "prose", "reasoning", "recall", "restore", "study", "training"]
WATCHED = ["torch", "transformers", "safetensors", "numpy", "scipy", "typer", "matplotlib", "peft", "accelerate"]


def run(*words, **how) -> subprocess.CompletedProcess:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, **how)


def row(versions: str) -> dict:
    "Install, run, count."
    found = dict(date=time.strftime("%Y-%m-%d", time.gmtime()), python=platform.python_version(), versions=versions)
    with tempfile.TemporaryDirectory() as folder:
        copy, python = Path(folder) / "copy", Path(folder) / "env" / "bin" / "python"
        copy.mkdir()
        unread = shutil.ignore_patterns("__pycache__", "site", "pages")
        for name in ("qkrestore_nb", "tests", "results", "docs", "nbs", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=unread)
        for name in ("pyproject.toml", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
        run("uv", "venv", "-q", "--python", sys.executable, python.parents[1])
        resolution = "lowest-direct" if versions == "lowest" else "highest"
        tools = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100"]
        what = ["--resolution", resolution, f"{copy}[train]", *tools]
        done = run("uv", "pip", "install", "-q", "--python", python, *what)
        if done.returncode: return found | dict(installed=False, why=done.stderr.strip().splitlines()[-1][:300])
        listed = json.loads(run("uv", "pip", "list", "--python", python, "--format", "json").stdout)
        have = {p["name"]: p["version"] for p in listed}
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(copy), CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
        tests, then = [f"tests/test_{name}.py" for name in CORE], time.perf_counter()
        plain = [python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
        pytest = lambda names: run(*plain, *names, cwd=copy, env=env)
        done = pytest(tests)
        counts = dict((word, int(n)) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout))
        failed = lambda done: re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, flags=re.M)
        bad = failed(done)
        again = failed(pytest(bad)) if bad else []  # some measure times, and a busy machine is late: those pass now
        if not counts: counts = dict(why=(done.stdout + done.stderr)[-300:])
    have = {name: have[name] for name in WATCHED if name in have}
    found |= dict(installed=True, packages=have, seconds=round(time.perf_counter() - then))
    return found | counts | dict(failed_once=bad, failed_twice=again)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("out", type=Path)
    ask.add_argument("--versions", choices=["newest", "lowest"], default="newest")
    args = ask.parse_args()
    new = row(args.versions)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    same = lambda r: (r["python"].rpartition(".")[0], r["versions"])
    rows = [r for r in rows if same(r) != same(new)] + [new]
    rows.sort(key=lambda r: (r["python"].split("."), r["versions"]))
    note = dict(seed=0, config=dict(tests=CORE, extra="train"), device=f"CPU, {os.cpu_count()} cores")
    note |= dict(date=new["date"], versions=dict(python=platform.python_version()), wall_s=new.get("seconds", 0))
    note["rows"] = rows
    args.out.write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps(new, indent=1))
    sys.exit(not new["installed"] or not new.get("passed") or bool(new["failed_twice"]))


if __name__ == "__main__": main()
