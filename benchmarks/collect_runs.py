"""Records of interrupted runs as results: `python benchmarks/collect_runs.py RUNS` reads the run folders (or the unpacked tar) of
benchmarks/seeds.py and writes results/experiment/<run>.json for each, with whatever kinds of fine-tuning were finished."""
import json
import sys
from pathlib import Path

target = Path(__file__).parent.parent / "results" / "experiment"
for run in sorted(p.parent for p in Path(sys.argv[1]).glob("*/recipe.json")):
    if not (run / "scores.json").exists(): continue
    read = lambda name: json.loads((run / f"{name}.json").read_text())
    config, scores = read("recipe"), read("scores")
    stages = {("sft" if p.stem == "sft-cot" else p.stem): json.loads(p.read_text()) for p in sorted(run.glob("sft-*.json"))}
    stages = dict(pretraining=read("pretraining"), **stages)
    for stage in stages.values(): stage["log"] = [x for x in stage["log"] if x["step"] % 100 == 0]
    first = stages["sft"]
    asked = ["cot"] + [k[4:] for k in stages if k.startswith("sft-") and f"{k[4:]}: vo" in scores]
    stages = {k: v for k, v in stages.items() if k in ("pretraining", "sft") or k[4:] in asked}
    seed = config.pop("seed")
    result = dict(seed=seed, config=dict(**config, kinds=asked), date=first["date"], versions=first["versions"], device=first["device"],
                  wall_s=round(sum(s["wall_s"] for s in stages.values()), 1), wall_is="training stages only", scores=scores, probes=read("probes"), **stages)
    (target / f"{run.name}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(run.name, asked, len(scores), "variants")
