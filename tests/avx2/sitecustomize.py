"""Makes a newer CPU look like one with AVX2 only, to PyTorch and to vLLM, which asks PyTorch.

On PYTHONPATH, beside ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``, which keep PyTorch's and
oneDNN's own kernels from newer instructions: vLLM then loads the library that it built for AVX2.
"""

import importlib.machinery
import sys

NEWER = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")


class NarrowLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        for name in NEWER:
            setattr(module, name, lambda: False)


class NarrowFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        spec = super().find_spec(name, path, target)
        if spec is not None:
            spec.loader = NarrowLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, NarrowFinder)
