"""Which engines name which of our families: `python benchmarks/checks/engines.py OUT.json WHEEL ...`.

Reads the list of models that stands in each engine's wheel (vllm, sglang, mlx_lm, gguf for llama.cpp), without installing it. A
name in a list says that somebody wrote the model; whether it runs is not tried here. Wheels: `pip download --no-deps NAME`."""
import argparse
import json
import re
from pathlib import Path
from zipfile import ZipFile

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qkrestore_nb.core import provenance
from qkrestore_nb.families import families

GGUF = dict(  # where the name is not the type in capitals
    qwen3_next=["QWEN3NEXT"], qwen3_5_text=["QWEN35"], qwen3_5_moe_text=["QWEN35MOE"], granitemoehybrid=["GRANITE_HYBRID"],
    lfm2_moe=["LFM2MOE"], llama4_text=["LLAMA4"], gemma3_text=["GEMMA3"])


def classes(model_type: str) -> set[str]:
    "What the model's class may be called, in small letters."
    text = model_type.removesuffix("_text")
    listed = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(t, ()) for t in (model_type, text))
    found = {x.lower() for names in listed for x in ([names] if isinstance(names, str) else names)}
    plain = text.replace("_", "")
    return found | {f"{plain}{version}forcausallm" for version in ("", "v2")}


def vllm(wheel: ZipFile) -> set[str]:
    listed = wheel.read("vllm/model_executor/models/registry.py").decode()
    return set(re.findall(r'^ +"(\w+)":', listed, flags=re.M))


def sglang(wheel: ZipFile) -> set[str]:
    found: set[str] = set()
    for name in wheel.namelist():
        if not re.fullmatch(r"sglang/srt/models/\w+\.py", name): continue
        entries = re.findall(r"^EntryClass = (\[.*?\]|\w+)", wheel.read(name).decode(), flags=re.M | re.S)
        found |= {word for entry in entries for word in re.findall(r"\w+", entry)}
    return found


def mlx_lm(wheel: ZipFile) -> set[str]:
    return {Path(n).stem for n in wheel.namelist() if re.fullmatch(r"mlx_lm/models/\w+\.py", n)}


def gguf(wheel: ZipFile) -> set[str]:
    listed = re.search(r"class MODEL_ARCH\(IntEnum\):\n(.*?)\n\n", wheel.read("gguf/constants.py").decode(), flags=re.S)
    assert listed
    return set(re.findall(r"^    (\w+) ", listed[1], flags=re.M))


READERS = dict(vllm=vllm, sglang=sglang, mlx_lm=mlx_lm, gguf=gguf)


def named(engine: str, known: set[str], model_type: str) -> bool:
    if engine == "mlx_lm": return bool({model_type, model_type.removesuffix("_text")} & known)
    if engine == "gguf": return bool({*GGUF.get(model_type, [model_type.upper()])} & known)
    return bool(classes(model_type) & {k.lower() for k in known})


ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ask.add_argument("out", type=Path)
ask.add_argument("wheels", type=Path, nargs="+")


def main():
    args = ask.parse_args()
    versions: dict[str, str] = {}
    table: dict[str, dict] = {m: {} for f in families.values() for m in f["models"]}
    for path in args.wheels:
        engine, version, *_ = path.name.split("-")
        with ZipFile(path) as wheel: known = READERS[engine](wheel)
        assert len(known) > 50, (engine, len(known))  # the list was found
        versions[engine] = version
        for model_type, row in table.items(): row[engine] = named(engine, known, model_type)
    note = provenance(0)
    made = note | dict(versions=note["versions"] | versions, models=table)
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    for model_type, row in table.items(): print(f"{model_type:<20}", *(e if ok else "-" * len(e) for e, ok in row.items()))


if __name__ == "__main__": main()
