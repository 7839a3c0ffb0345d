"""Import what a server on a GPU imports, on a machine without one: ``python benchmarks/gpu/as_if_cuda.py``.

Torch is made to say that there is a Hopper GPU, and a library with the name of CUDA's driver is made with the compiler;
nothing is computed. What a GPU's server imports and the wheels lack is found here, not on the GPU.
"""

import ctypes
import importlib
import subprocess
import tempfile
import types
from pathlib import Path

import torch

GPU = types.SimpleNamespace(
    major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
)  # fmt: skip
SAID = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
    "get_device_name": GPU.name, "get_device_properties": GPU, "_lazy_init": None,
}  # fmt: skip
MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.speculative.eagle_worker_v2",
    "sglang.srt.layers.attention.triton_backend",
    "sglang.srt.models.llama",
    "sglang.srt.models.llama_eagle3",
    "flashinfer.sampling",
    "trainer.loop",
)


def load_driver() -> None:
    """SGLang's kernels are linked with the driver; of its functions they name one."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so.1")
        source.write_text("int cuPointerGetAttribute(void) { return 1; }\n")
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    load_driver()
    for name, said in SAID.items():
        setattr(torch.cuda, name, lambda *_, said=said: said)
    for name in MODULES:
        importlib.import_module(name)
        print(f"imported {name}")


if __name__ == "__main__":
    main()
