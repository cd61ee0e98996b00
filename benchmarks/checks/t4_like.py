"""Every notebook from top to bottom in the profile colab, on a larger GPU that has a T4's restrictions switched on (`t4/sitecustomize.py`).

    python benchmarks/checks/t4_like.py --jobs 8 --experiment --out results/t4-like.json

Nothing is installed: what the notebooks and nbclient need has to be there. Each notebook has a process and two CPU cores to itself, and all share the GPU.
With --experiment the run of chapter 10 (`qkrestore experiment --profile colab`) as well. Without a GPU the notebooks run in the profile smoke, and nothing is restricted."""
import argparse
import json
import os
import queue
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINUTES, LONGER = 5, {"10_amnesia.ipynb": 25, "experiment": 25}
GB = runpy.run_path(str(Path(__file__).with_name("t4") / "sitecustomize.py"))["GB"]  # under another name it restricts nothing
RUN = """
import os, sys, tempfile
os.sched_setaffinity(0, {int(c) for c in sys.argv[1].split(",")})
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
# sockets in the file system: of many kernels that start at once, two may be given the same port
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=tempfile.mkdtemp() + "/kernel")
NotebookClient(nbformat.read(sys.argv[2], 4), km=kernel, timeout=1800, startup_timeout=180, resources={"metadata": {"path": "nbs"}}).execute()
"""
EXPERIMENT = """
import os, sys
os.sched_setaffinity(0, {int(c) for c in sys.argv[1].split(",")})
if __name__ == "__main__":
    from qkrestore_nb.experiment import run
    run(None, sys.argv[2])
"""
CHECK = """
import json, sys, torch
from qkrestore_nb.core import pick_profile
from qkrestore_nb.linear_attention import linear_attention_triton, pick_backend
seen = dict(profile=pick_profile().name)
def tried(f):
    try: f()
    except Exception as e: return f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"
    return "runs"
if torch.cuda.is_available():
    half, brain = (torch.ones(1, 2, 128, 64, device="cuda", dtype=t) for t in (torch.float16, torch.bfloat16))
    triple, decay, attend = [x.transpose(1, 2) for x in (half,) * 3], -torch.ones(2, device="cuda"), torch.nn.functional.scaled_dot_product_attention
    seen |= dict(capability=torch.cuda.get_device_capability(), bf16_supported=torch.cuda.is_bf16_supported(), backend=pick_backend(4096, torch.device("cuda")),
                 float16=tried(lambda: half @ half.mT), float16_compiled=tried(lambda: torch.compile(lambda x: (x @ x.mT).relu())(half)), float16_attention=tried(lambda: attend(half, half, half)),
                 bfloat16=tried(lambda: brain @ brain.mT), bfloat16_compiled=tried(lambda: torch.compile(lambda x: (x @ x.mT).relu())(brain)), bfloat16_attention=tried(lambda: attend(brain, brain, brain)),
                 fla=tried(lambda: linear_attention_triton(*triple, decay)), gb_14=tried(lambda: torch.empty(14 * 10**9, dtype=torch.int8, device="cuda")), gb_16=tried(lambda: torch.empty(16 * 10**9, dtype=torch.int8, device="cuda")))
print(json.dumps(seen))
"""
RESTRICTIONS = [f"torch.cuda says sm_75 and {GB} GB (is_bf16_supported: yes by emulation, as on a T4); those who compile for the GPU are told the truth",
                f"a process that reserves more than {GB} GB runs out of memory", "on the GPU matrix products, fused attention and convolutions in bfloat16 are errors, in autocast, in compiled code and backward too",
                "launching a kernel of flash-linear-attention is an error", "attention without FlashAttention's and cuDNN's kernels", "no TF32", "os.cpu_count says how many cores the process has"]
NOT_IMITATED = ["the speed of a T4 (65 TFLOP/s in float16, 320 GB/s) and of Colab's two cores", "its shared memory, 64 KiB a multiprocessor: a kernel that needs more would fail there",
                "machine code for sm_75: compilers make it for the GPU that is there", "sums and single operations in bfloat16, which a T4 emulates, are let pass", f"two processes of one notebook share one GPU's memory there and have {GB} GB each here"]


def start(command: list, copy: Path, peaks: Path, cores: int) -> subprocess.CompletedProcess:
    "A process that has the restrictions, as all its children will."
    path = [Path(__file__).resolve().with_name("t4"), copy, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | dict(PYTHONPATH=os.pathsep.join(map(str, path)), T4_PEAKS=str(peaks), OMP_NUM_THREADS=str(cores), NVIDIA_TF32_OVERRIDE="0")
    return subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True)


def run(name: str, command: list[str], copy: Path, cores: queue.Queue, folder: Path) -> dict:
    "Seconds, GB of GPU memory over all its processes, and the last line of what went wrong, if anything did."
    mine, peaks = cores.get(), folder / f"peaks-{name}"
    peaks.mkdir()
    then = time.perf_counter()
    done = start([*command[:-1], ",".join(map(str, mine)), command[-1]], copy, peaks, len(mine))
    cores.put(mine)
    row = dict(passed=done.returncode == 0, seconds=round(time.perf_counter() - then, 1), peak_gpu_gb=round(sum(float(p.read_text()) for p in peaks.iterdir()), 2))
    if not row["passed"]:
        print(done.stderr[-3000:], file=sys.stderr)
        row["error"] = ([line for line in done.stderr.splitlines() if line.strip()] or ["no word"])[-1]
    print(name, row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores of each; a T4 in Colab has two beside it")
    parser.add_argument("--only", nargs="*", help="notebooks by name")
    parser.add_argument("--experiment", action="store_true", help="chapter 10's own run as well")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from qkrestore_nb.core import provenance
    known = json.loads((ROOT / "results" / "colab-like.json").read_text())["notebooks"]
    names = [p.name for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not args.only or p.name in args.only]
    names.sort(key=lambda n: -known.get(n, dict(seconds=0))["seconds"])  # the longest first
    there, cores, rows = sorted(os.sched_getaffinity(0)), queue.Queue(), {}
    for j in range(args.jobs): cores.put(sorted({there[(j * args.cores + i) % len(there)] for i in range(args.cores)}))
    then = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copy = Path(folder) / "qkrestore_nb"
        for part in ("nbs", "qkrestore_nb", "results"): shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        (copy / "experiment.py").write_text(EXPERIMENT)
        checked = start(["-c", CHECK], copy, Path(folder), args.cores)
        if checked.returncode: sys.exit(checked.stderr)
        check = json.loads(checked.stdout.splitlines()[-1])
        print(check, flush=True)
        wrong = [k for k, may in dict(float16=1, float16_compiled=1, float16_attention=1, gb_14=1, bfloat16=0, bfloat16_attention=0, fla=0, gb_16=0).items() if k in check and may != (check[k] == "runs")]
        if wrong: sys.exit(f"not as on a T4: {wrong}")
        work = {n: ["-c", RUN, str(copy / "nbs" / n)] for n in names}
        if args.experiment: work = dict(experiment=["experiment.py", str(Path(folder) / "experiment")]) | work
        for name, row in zip(work, pool.map(lambda n: run(n, work[n], copy, cores, Path(folder)), work)): rows[name] = row
        ran = args.experiment and rows["experiment"]["passed"]
        measured = json.loads((Path(folder) / "experiment" / "hypenet7m-near-seed0.json").read_text()) if ran else None
    record = provenance(0, jobs=args.jobs, cores=args.cores, gpu_gb=GB, minutes=MINUTES, minutes_of_longer=LONGER, restrictions=RESTRICTIONS, not_imitated=NOT_IMITATED)
    record["config"]["restricted"] = check["profile"] == "colab"
    for name in ("numpy", "matplotlib", "tqdm", "typer", "accelerate", "triton", "flash-linear-attention", "ipykernel"):
        try: record["versions"][name] = version(name)
        except PackageNotFoundError: pass
    late = [n for n, r in rows.items() if r["seconds"] > 60 * LONGER.get(n, MINUTES)]
    large = [n for n, r in rows.items() if r["peak_gpu_gb"] >= GB]
    record |= dict(check=check, wall_s=round(time.perf_counter() - then, 1), passed=sum(r["passed"] for r in rows.values()), failed=[n for n, r in rows.items() if not r["passed"]], late=late, too_large=large,
                   notebooks={n: rows[n] for n in sorted(set(rows) - {"experiment"})})
    if args.experiment: record["experiment"] = rows["experiment"] | ({"profile": measured["config"]["profile"], "scores": measured["scores"], "log": measured["sft"]["log"]} if measured else {})
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['passed']} passed, failed: {record['failed']}, late: {late}, too large: {large}; {record['wall_s']} s")
    sys.exit(bool(record["failed"] or late or large))


if __name__ == "__main__": main()
