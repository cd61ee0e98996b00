"""Every notebook from top to bottom in an environment made as Colab's is: no nbdev, the versions that are there already are kept.

    python benchmarks/checks/colab_like.py --python python3.13 --out results/colab-like.json
    python benchmarks/checks/colab_like.py --python python3.12 --have torch==2.7.0 transformers==5.15.0 safetensors==0.8.0 matplotlib==3.8.0 tqdm==4.66.0 typer==0.16.0 accelerate==1.10.1 --extra "" --out results/oldest-versions.json

First what Colab has (--have), then the package with the extra that the notebooks' second cell asks for, then all cells of all notebooks,
one notebook at a time, each in a kernel of its own. The checkout is copied first; nothing in it is touched."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLAB = ["torch==2.11.0", "transformers==5.15.0", "numpy==2.1.*", "matplotlib==3.10.*", "fastcore>=2,<3", "accelerate"]  # of August 2026, with Python 3.13
RUN = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=1800, kernel_name="python3", resources={"metadata": {"path": "nbs"}}).execute()
"""


def versions(python: Path, root: Path) -> dict:
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], cwd=root, capture_output=True, text=True, check=True).stdout
    return {p["name"]: p["version"] for p in json.loads(listed)}


def environment(python: str, folder: Path, have: list[str], extra: str, copy: Path) -> tuple[Path, dict, dict]:
    "The new environment's Python, and its versions before and after the package came."
    subprocess.run([python, "-m", "venv", folder], check=True)
    new = folder / "bin" / "python"
    install = lambda *what: subprocess.run([new, "-m", "pip", "install", "-q", *what], check=True)
    install("nbclient", "ipykernel", *have)
    before = versions(new, copy)
    install(f"{copy}[{extra}]" if extra else str(copy))
    return new, before, versions(new, copy)


def run(python: Path, notebook: Path, copy: Path) -> dict:
    "Seconds, and the last line of what went wrong, if anything did."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")} | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    start = time.perf_counter()
    done = subprocess.run([python, "-c", RUN, notebook], cwd=copy, env=env, capture_output=True, text=True)
    row = dict(seconds=round(time.perf_counter() - start, 1), passed=done.returncode == 0)
    if not row["passed"]:
        print(done.stderr[-3000:], file=sys.stderr)
        row["error"] = ([line for line in done.stderr.splitlines() if line.strip()] or ["no word"])[-1]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--have", nargs="*", default=COLAB, help="what is installed before the package")
    parser.add_argument("--extra", default="gpu", help="the package's extra, or none")
    parser.add_argument("--only", nargs="*", help="notebooks by name")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "qkrestore_nb"
        for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
            if not (ROOT / name).is_file(): continue
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        start = time.perf_counter()
        python, before, after = environment(args.python, Path(folder) / "env", args.have, args.extra, copy)
        installed, rows = time.perf_counter() - start, {}
        for notebook in sorted((copy / "nbs").glob("*.ipynb")):
            if args.only and notebook.name not in args.only: continue
            rows[notebook.name] = run(python, notebook, copy)
            print(notebook.name, rows[notebook.name], flush=True)
        facts = "import json, platform, torch; print(json.dumps([platform.python_version(), torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads']))"
        version, device = json.loads(subprocess.run([python, "-c", facts], capture_output=True, text=True, check=True).stdout)
    names = ("torch", "transformers", "safetensors", "numpy", "matplotlib", "tqdm", "typer", "fastcore", "flash-linear-attention", "ipykernel")
    record = dict(seed=0, config=dict(have=args.have, extra=args.extra, cores=os.cpu_count()), date=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                  versions=dict(python=version, **{n: after[n] for n in names if n in after}), device=device,
                  changed={n: [v, after.get(n)] for n, v in before.items() if after.get(n) != v},  # by installing the package: should be none
                  install_s=round(installed, 1), wall_s=round(sum(r["seconds"] for r in rows.values()), 1),
                  passed=sum(r["passed"] for r in rows.values()), failed=[n for n, r in rows.items() if not r["passed"]], notebooks=rows)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['passed']} passed, {len(record['failed'])} failed, {record['wall_s']} s")


if __name__ == "__main__": main()
