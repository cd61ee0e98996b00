"fla's kernels without a GPU: Triton's interpreter runs them in float32 on the CPU, in a process and a folder of their own."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import builtins, json
import torch
import fla.ops.common.chunk_h as h, fla.ops.common.chunk_o as o
from triton.runtime.interpreter import _implicit_cvt
from qkrestore_nb.linear_attention import compare_forms

for module in (h, o):  # nothing to tune: one tile each
    for name in dir(module):
        kernel = getattr(module, name)
        while hasattr(kernel, "fn") and not hasattr(kernel, "configs"): kernel = kernel.fn
        if hasattr(kernel, "configs"): kernel.configs = kernel.configs[:1]
number = lambda x: int(x.handle.data.item()) if hasattr(x, "handle") else int(x)
h.range = lambda *a: map(_implicit_cvt, builtins.range(*map(number, a)))  # the kernels count on range giving Triton's integers
print(json.dumps(compare_forms(["triton"], "cpu", torch.float32, lengths=(64, 100, 130), H=3, D=16)))
"""

COMPILED = CODE.rsplit("print", 1)[0] + """
from qkrestore_nb.linear_attention import FORMS, decay_slopes

torch.manual_seed(0)
x = (torch.randn(3, 1, 100, 2, 16) / 4).requires_grad_()
state = torch.randn(1, 2, 16, 16).requires_grad_()
documents, borders = torch.tensor([[0] * 30 + [1] * 40 + [2] * 3 + [3] * 27]), torch.tensor([0, 30, 70, 73, 100, 100, 100])
def loss(form, x, state, *documents):  # quadratic: a loss that bends more would magnify the rounding of o, not test the kernels
    o, S = form(*x, -decay_slopes(2).to(x.dtype), state, *documents)
    return o.square().sum() + S.square().sum()
graphs = []
def backend(graph, inputs):
    from torch._dynamo.backends.debugging import aot_eager
    graphs.append("lightning" in str(graph.code))
    return aot_eager(graph, inputs)
for S, d in ((None, []), (state, []), (state, [documents, borders])):
    judge = [y.detach().double().requires_grad_() for y in ([x] if S is None else [x, S])]
    want = torch.autograd.grad(loss(FORMS["chunked"], judge[0], None if S is None else judge[1], *d[:1]), judge)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(FORMS["triton"], x, S, *d), [x] if S is None else [x, S])
    for a, b in zip(got, want): assert (a - b).norm() < 1e-5 * b.norm(), (a - b).norm() / b.norm()
assert graphs == [True] * 3, graphs
print("same")
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "fla and Triton beside the environment, not in it: where there is no GPU, their presence breaks other models."
    folder = tmp_path_factory.mktemp("kernels")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "flash-linear-attention>=0.6,<0.7",
                           "fla-core>=0.6,<0.7", "einops", "triton"], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"flash-linear-attention could not be fetched: {done.stderr.strip().splitlines()[-1]}")
    yield folder
    shutil.rmtree(folder)


def said(code, kernels) -> str:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(kernels)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_kernels_agree_with_the_float64_recurrence(kernels):
    rows = json.loads(said(CODE, kernels))
    assert {r["case"] for r in rows} == {"", "state", "documents"}
    for r in rows: assert max(r["o"], r["state"], r["grad"]) < 1e-5, r


@pytest.mark.slow
def test_under_compilation_they_are_one_operator_with_its_own_backward(kernels):
    assert said(COMPILED, kernels) == "same"
