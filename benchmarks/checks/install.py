"""How long each extra takes to install in a fresh environment, and how large it is: `python benchmarks/checks/install.py`.

    python benchmarks/checks/install.py --out results/install.json        # all of them
    python benchmarks/checks/install.py --extras gpu --out results/install.json

One at a time, with a C compiler that refuses: what needs one fails, and its row says so. Each row has its date and the
machine's load before it; rows of other extras stay in the file."""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ["", "docs", "notebooks", "real", "gpu", "train", "eval", "dev"]
WATCHED = ("torch", "transformers", "safetensors", "sphinx", "jupyterlab", "trl", "lm_eval", "nbdev")


def installed(extra: str, constraints: list[str]) -> dict:
    "Seconds, megabytes and packages of one environment."
    with tempfile.TemporaryDirectory() as folder:
        env, copy = Path(folder) / "env", Path(folder) / "copy"
        unread = shutil.ignore_patterns(".git", "site", "pages", ".mathjax", "results", "nbs")
        shutil.copytree(ROOT, copy, ignore=unread)
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        before, what = time.perf_counter(), f"{copy}[{extra}]" if extra else str(copy)
        pip = lambda *words: subprocess.run([env / "bin" / "pip", *words], capture_output=True, text=True,
                                            env=os.environ | dict(CC="false", CXX="false"))
        done = pip("install", "-q", what, *constraints)
        row = dict(seconds=round(time.perf_counter() - before, 1), passed=done.returncode == 0)
        if done.returncode: return row | dict(error=done.stderr.strip().splitlines()[-1])
        found = {p["name"]: p["version"] for p in json.loads(pip("list", "--format", "json").stdout)}
        size = sum(p.stat().st_size for p in env.rglob("*") if p.is_file() and not p.is_symlink())
        versions = {name: found[name] for name in WATCHED if name in found}
        return row | dict(mb=round(size / 1e6), packages=len(found), versions=versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=EXTRAS)
    parser.add_argument("--constraints", default=str(ROOT / ".ci" / "constraints.txt"), help='"" for none')
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "install.json")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["extras"] if args.out.exists() else {}
    for name in args.extras:
        then, load = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), round(os.getloadavg()[0], 1)
        row = installed(name, ["-c", args.constraints] if args.constraints else [])
        rows[name or "no extra"] = dict(date=then, load=load) | row
        print(name or "no extra", rows[name or "no extra"], flush=True)
        config = dict(constraints=bool(args.constraints), cores=os.cpu_count())
        wall, versions = round(sum(r["seconds"] for r in rows.values()), 1), dict(python=platform.python_version())
        record = dict(seed=0, config=config, date=then, versions=versions, device=f"CPU, {os.cpu_count()} cores",
                      wall_s=wall, extras=rows)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
