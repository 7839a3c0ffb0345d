"""On PYTHONPATH: ``--quantization w8a8_fp8`` runs on a CPU, whose product SGLang only has as a GPU's kernel.

Everything else of it (weights quantized while they are loaded, scales, transposed layout) is SGLang's.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

_MODULE = "sglang.srt.layers.quantization.w8a8_fp8"


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_replace(module):
            execute(module)
            module.W8A8Fp8LinearMethod.apply = _apply

        spec.loader.exec_module = execute_and_replace
        return spec


def _apply(method, layer, x, bias=None):
    out = x @ (layer.weight.to(x.dtype) * layer.weight_scale.to(x.dtype))
    return out if bias is None else out + bias


sys.meta_path.insert(0, _Finder())
