"""Turn a GGUF file into a Hugging Face directory: bfloat16 safetensors, config, tokenizer with its chat template.

    python -m kvstore.demo.gguf_model FILE.gguf DIRECTORY

Run as a child of `models`: it needs about 0.9 GB and half a minute for a model of 135M parameters. `transformers` reads
GGUF itself but refuses to save what it has read, and parses the file anew for config, tokenizer and weights; both are
mended here.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path


def convert(source: Path, target: Path) -> None:
    """Write the model of the GGUF file `source` into the existing, empty directory `target`."""
    import gguf
    import torch
    import transformers
    from safetensors.torch import save_file

    # One parse for all three readers; the parse is most of the work, in pure Python.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    folder, name = str(source.resolve().parent), source.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)

    # save_pretrained refuses a model that was quantized; the weights are plain tensors by now, so save those.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in tied}
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
