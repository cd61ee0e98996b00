"""A T4's restrictions on a larger GPU. Python imports this file by its name at its start, in every process that has its folder first on PYTHONPATH.

torch is not imported here: it is restricted once somebody imports it, and where there is no GPU nothing happens."""
import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

CAPABILITY, GB = (7, 5), 15  # t4_like.py takes its GB from here
PRODUCTS = ("mm", "mm.out", "bmm", "bmm.out", "addmm", "addmm.out", "addmm_", "baddbmm", "baddbmm.out", "baddbmm_", "addmv", "addmv.out", "addmv_", "dot", "_addmm_activation",
            "_addmm_activation.out", "_scaled_dot_product_efficient_attention", "cudnn_convolution", "cudnn_convolution.out", "_conv_depthwise2d", "_conv_depthwise2d.out")
# machine code for the real GPU must be made for the real GPU: those who make it are told the truth
COMPILERS = ("triton", "torch._inductor", "torch._dynamo.device_interface")


class NotOnT4(RuntimeError): "Something that a T4 has no hardware for."


def restrict(torch):
    "Tell everybody that the GPU is an sm_75 of 15 GB, and hold them to it."
    import atexit
    cuda, properties, free = torch.cuda, torch.cuda.get_device_properties, torch.cuda.mem_get_info

    class Properties:
        "The GPU's own, but for what a T4 has less of."
        def __init__(self, own): self._own = own
        def __getattr__(self, name): return dict(major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=int(GB * 1e9)).get(name, getattr(self._own, name))

    def asked_by_compiler(): return sys._getframe(2).f_globals.get("__name__", "").startswith(COMPILERS)

    def get_device_properties(device=None):
        own = properties(device)
        return own if asked_by_compiler() else Properties(own)

    def get_device_capability(device=None):
        own = properties(device)
        return (own.major, own.minor) if asked_by_compiler() else CAPABILITY

    def mem_get_info(device=None): return min(free(device)[0], int(GB * 1e9) - cuda.memory_reserved(device)), int(GB * 1e9)

    # torch.cuda.is_bf16_supported asks the properties; on a T4 it says yes, and no with including_emulation=False
    cuda.get_device_properties, cuda.get_device_capability, cuda.mem_get_info = get_device_properties, get_device_capability, mem_get_info

    def begin():
        "As soon as the process touches the GPU."
        cuda.set_per_process_memory_fraction(GB * 1e9 / properties(0).total_memory)
        torch.backends.cuda.enable_flash_sdp(False)  # the switch holds for tensors on the CPU as well
        torch.backends.cuda.enable_cudnn_sdp(False)
        atexit.register(leave_peak)

    def leave_peak():
        if folder := os.environ.get("T4_PEAKS"): open(f"{folder}/{os.getpid()}", "w").write(str(cuda.max_memory_reserved() / 1e9))

    if not cuda.is_available(): return
    cuda._lazy_call(begin)
    refuse(torch, "CUDA")
    cores = len(os.sched_getaffinity(0))
    os.cpu_count = lambda: cores  # of this process, as on a machine that has no more


def refuse(torch, key):
    "Products in bfloat16 become errors where PyTorch calls its kernels: before autograd, autocast and compiled code have any say, forward and backward."
    if not hasattr(torch.library, "get_kernel"): return print("bfloat16 is not refused: this PyTorch is too old", file=sys.stderr)
    global library  # or it would be collected, and what it holds undone
    library = torch.library.Library("aten", "IMPL")

    def guard(name):
        kernel = torch.library.get_kernel(f"aten::{name}", key)

        def checked(keys, *args, **kwargs):
            if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args): raise NotOnT4(f"{name} in bfloat16: a T4 only emulates it, use float16")
            return kernel.call_boxed(keys, *args, **kwargs)

        library.impl(name, checked, key, with_keyset=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name in PRODUCTS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key): guard(name)


def without_fla(jit):
    "Kernels of flash-linear-attention are not for a T4: launching one is an error. (The compiler's own Triton kernels do not come this way.)"
    run = jit.JITFunction.run

    def checked(self, *args, **kwargs):
        if self.fn.__module__.split(".")[0] == "fla": raise NotOnT4(f"{self.fn.__module__}.{self.fn.__name__} was called: fla's kernels need sm_80")
        return run(self, *args, **kwargs)

    jit.JITFunction.run = checked


AFTER = {"torch": restrict, "triton.runtime.jit": without_fla}


class Afterwards(MetaPathFinder):
    "Calls AFTER[name](module) when a module has been imported."
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name in AFTER else None
        if spec is None: return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            AFTER[name](module)

        spec.loader.exec_module = exec_module
        return spec


# only where this file is what Python imports at its start: tests import it by another name
if __name__ == "sitecustomize": sys.meta_path.insert(0, Afterwards())
