"""Any x86-64 processor as one with AVX2 only, for each Python process with this directory in its PYTHONPATH.

`.ci/test-vllm` puts it there for ATEN_CPU_CAPABILITY=avx2. That variable is PyTorch's own. vLLM does not know it: it
asks PyTorch what the processor has, and takes its build for AVX2 if there is nothing newer.
"""

import torch

for _name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, _name, lambda: False)
