"""serve_sglang.py [flags]: SGLang's server on a machine with any CPU. Its scheduler and detokenizer fork from it.

SGLang's CPU engine imports kernels that exist for CUDA or AMX only, though Qwen3 runs without them. They are replaced
with the least that lets the server start:

- `sgl_kernel`: names can be imported; calling one raises. None is called here.
- `torchvision`: the wheel is built against a CUDA torch; without the operator `nms` its import ends in an error.
- `pin_memory`: SGLang's LoRA layers ask for pinned memory, which a machine without a GPU does not have.
- `Tensor.cuda`, `torch.cuda.synchronize`: called by `/weights_checker` and by checkpoint-engine's worker even on CPU.

SGLang spawns its processes, and each imports SGLang anew, which takes half of the start. So here they fork, and inherit
the replacements.
"""

import functools
import importlib.abc
import importlib.machinery
import multiprocessing
import sys
import types

import torch


class _Kernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `sgl_kernel` and every module in it but `scalar_type`, which SGLang replaces itself."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sgl_kernel" and name != "sgl_kernel.scalar_type":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__version__ = "0.0.0"

        def missing(name):
            if name.startswith("__"):
                raise AttributeError(name)

            def kernel(*_args, **_options):
                raise NotImplementedError(f"{spec.name}.{name} does not exist on this CPU")

            return kernel

        module.__getattr__ = missing
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Kernels())
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.Tensor.cuda = lambda self, *_args, **_options: self
torch.cuda.synchronize = lambda *_args, **_options: None
torch.Tensor.pin_memory = lambda self, *_args, **_options: self


def _unpinned(make):
    @functools.wraps(make)
    def unpinned(*args, **options):
        options.pop("pin_memory", None)
        return make(*args, **options)

    return unpinned


for _name in ("tensor", "empty", "zeros", "ones", "full"):
    setattr(torch, _name, _unpinned(getattr(torch, _name)))
_set_start_method = multiprocessing.set_start_method
multiprocessing.set_start_method = lambda _method, force=False: _set_start_method("fork", force=True)


if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
