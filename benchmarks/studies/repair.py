"""What `qkrestore repair` finds on the shipped pair: `python benchmarks/studies/repair.py OUT`.

Writes OUT/near.json (post) and OUT/packed.json (its packed sibling): every candidate on the questions that chose, the
finalists on fresh ones. The tasks are chains of eight steps, of the two kinds in which nothing is drawn at random."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from qkrestore_nb.experiment import pair
from qkrestore_nb.reasoning import problem
from qkrestore_nb.recall import decode
from qkrestore_nb.repair import repair, report


def write_tasks(file: Path, n: int, steps: int = 8) -> Path:
    "Chains as json lines: the question, and what stands after ANS."
    rng = np.random.default_rng(0)
    with open(file, "w") as f:
        for i in range(n):
            ids, known = problem(rng, "MA"[i % 2], steps)
            text = decode(ids)
            task = dict(prompt=decode(ids[: known.argmax()]), answer=text[text.index("ANS") :])
            f.write(json.dumps(task) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--haystacks", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=["near", "packed"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            tasks, fixed = write_tasks(Path(folder) / "tasks.jsonl", args.tasks), Path(folder) / "fixed"
            done = repair(
                pair() / "pre",
                pair() / ("post" if kind == "near" else kind),
                out=fixed,
                tasks=tasks,
                lengths=args.lengths,
                haystacks=args.haystacks,
                room=64,
                on_progress=lambda text: print(text, flush=True),
            )
            found = json.loads(Path(f"{fixed}.repair.json").read_text())
            found["record"]["config"] |= dict(pre="pair/pre", post=f"pair/{kind}", tasks=f"{args.tasks} chains of 8")
            found["out"] = found["out"] and "fixed"
            (args.out / f"{kind}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(report(done), flush=True)


if __name__ == "__main__":
    main()
