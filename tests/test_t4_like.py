"The restrictions of benchmarks/checks/t4: what they tell, what they refuse, and that children have them. No GPU is needed: a larger one is pretended."
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
T4 = ROOT / "benchmarks" / "checks" / "t4"
PRETEND = """
import importlib.util, sys, types, torch
spec = importlib.util.spec_from_file_location("t4", sys.argv[1])
t4 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t4)
cuda, GB = torch.cuda, 1e9
cuda.is_available, cuda.memory_reserved, cuda.mem_get_info = lambda: True, lambda d=None: int(2 * GB), lambda d=None: (int(70 * GB), int(80 * GB))
cuda.get_device_properties = lambda d=None: types.SimpleNamespace(major=9, minor=0, total_memory=int(80 * GB), name="H100", multi_processor_count=132)
cuda.current_device, cuda.memory_allocated = lambda: 0, cuda.memory_reserved
"""


def run(code: str, **env) -> str:
    done = subprocess.run([sys.executable, "-c", PRETEND + code, str(T4 / "sitecustomize.py")], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_told():
    run("""
queued = []
cuda._lazy_call, refused = queued.append, []
t4.refuse = lambda torch, key: refused.append(key)
t4.restrict(torch)
from qkrestore_nb.core import pick_profile
from qkrestore_nb.linear_attention import pick_backend
from qkrestore_nb.scale import room_gb
assert cuda.get_device_capability() == (7, 5) and cuda.get_device_properties(0).major == 7 and cuda.get_device_properties(0).name == "H100"
assert pick_profile().name == "colab" and pick_profile().dtype == "float16"
assert pick_backend(4096, torch.device("cuda"))[0] == "chunked" and "sm_75" in pick_backend(4096, torch.device("cuda"))[1]
assert room_gb("cuda") == 13.0 and not cuda.is_bf16_supported(including_emulation=False)
compiler = dict(__name__="triton.backends.nvidia.driver")
exec("def ask(cuda): return cuda.get_device_capability(), cuda.get_device_properties(0).major", compiler)
assert compiler["ask"](cuda) == ((9, 0), 9)  # what is compiled must run on the GPU that is there
shares = []
cuda.set_per_process_memory_fraction = shares.append
queued[0]()
assert shares == [15 / 80] and refused == ["CUDA"] and not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
""", T4_PEAKS="")


def test_what_is_refused():
    "The same guards on the CPU's kernels: called directly, in autocast, backward."
    out = run("""
t4.refuse(torch, "CPU")
F, x, b = torch.nn.functional, torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, dtype=torch.bfloat16)
def autocast():
    with torch.autocast("cpu", torch.bfloat16): x @ x
for f in (lambda: b @ b, lambda: F.linear(b, b), lambda: F.linear(b, b, b[0]), lambda: b @ b[0], lambda: torch.einsum("bij,bjk->bik", b[None], b[None]), autocast):
    try: f()
    except t4.NotOnT4 as e: print(e)
(x.half() @ x.half()).sum().backward()
assert (x.grad == 8).all() and (b + b == 2).all()
""")
    assert [line.split()[0] for line in out.splitlines()] == ["mm", "mm", "addmm", "addmv_", "bmm", "mm"]


def test_fla_is_refused():
    run("""
class JITFunction:
    def __init__(self, module):
        self.fn = lambda: None
        self.fn.__module__ = module
    def run(self, *args): return args
t4.without_fla(types.SimpleNamespace(JITFunction=JITFunction))
assert JITFunction("torch._inductor.kernel").run(1) == (1,)
try: JITFunction("fla.ops.common.chunk_h").run(1)
except t4.NotOnT4 as e: assert "sm_80" in str(e)
else: raise AssertionError("fla ran")
""")


def test_children_have_them(tmp_path):
    "The hook comes after torch's import, in a child of a child too, and costs nothing before it."
    code = """
import sys
assert "torch" not in sys.modules and "sitecustomize" in sys.modules
import torch
assert torch.cuda.get_device_capability.__module__ == "sitecustomize"
"""
    env = os.environ | {"PYTHONPATH": f"{T4}{os.pathsep}{ROOT}"}
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    assert subprocess.run([sys.executable, "-c", parent], env=env).returncode == 0


def test_notebooks_of_a_machine_without_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "checks" / "t4_like.py"), "--only", "00_core.ipynb", "08a_families.ipynb", "--jobs", "2", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"seed", "config", "versions", "device", "wall_s"} <= record.keys() and not record["config"]["restricted"] and record["passed"] == 2
    assert all(r["passed"] and r["peak_gpu_gb"] == 0 for r in record["notebooks"].values()) and record["failed"] == record["late"] == record["too_large"] == []
