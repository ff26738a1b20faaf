"""What codecs cost in quality, on a model: distributions, top tokens and answers with keys and values that came back.

A text's prefix is computed once. Its keys and values are rounded to bfloat16, which is the baseline, and then coded and
decoded page by page as a tier would. The rest of the text is computed after each of them, all in float32, so that
nothing but the codec differs: the Kullback-Leibler divergence of the next token (nats, mean over tokens) and the share
of tokens whose likeliest one stays. Perplexity is left out: it hides most of this.

The noise floor is the model in bfloat16 against itself in float32, nothing stored: a codec below it is lost in what
serving in bfloat16 does anyway.

A needle is a number told once, at the begin of a text, and asked for at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.transformers.layout import CacheShapes, cache_shapes, layout_of, new_cache
from kvstore.codecs.lossy import LOSSY, LossyCodec, quantizer_of
from kvstore.errors import ConfigError
from kvstore.extras import how_to_install
from kvstore.layout import LayerGroup, Layout

BLOCK = 64
PREFIX = 448  # within the window of 512 that small sliding models have, so that every layer is coded
SUFFIX = 192
FLOOR_TOKENS = 192  # bfloat16 is slow on most CPUs
ANSWER_TOKENS = 8
GATES = {"near": 2e-4, "compact": 1e-3, "small": 5e-3}  # nats
NEEDLES = (("Lisbon", 4182), ("Osaka", 9037), ("Quito", 2761), ("Oslo", 5590), ("Accra", 7318), ("Perth", 6604))


@dataclass(frozen=True, slots=True)
class Quality:
    """One codec on one model. max_error: the largest relative error of a page's tensor; gate: None for the baseline."""

    codec: str
    ratio: float
    kl: float
    top1: float
    max_error: float
    needles: int
    gate: float | None

    @property
    def passes(self) -> bool:
        """True if the divergence is below the gate."""
        return self.gate is None or self.kl < self.gate


@dataclass(frozen=True, slots=True)
class QualityReport:
    """All codecs on one model, and how many texts, tokens and needles stand behind it."""

    model: str
    floor_kl: float
    floor_top1: float
    texts: int
    tokens: int
    num_needles: int
    codecs: tuple[Quality, ...]


def load_model(path: Path) -> tuple[Any, Any]:
    """Model (float32, CPU) and tokenizer of a directory or a GGUF file. Raises ConfigError for what is none."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"codec check computes with a model; {how_to_install('transformers')}") from error
    if path.is_file() and path.suffix == ".gguf":
        where, named = str(path.parent), {"gguf_file": path.name}
    elif (path / "config.json").is_file():
        where, named = str(path), {}
    else:
        raise ConfigError(f"--model is {path}; it must be a directory with a config.json, or a .gguf file")
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **named).eval()
        return model, AutoTokenizer.from_pretrained(where, **named)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {path} cannot be loaded: {error}") from error


def usual_texts(count: int) -> list[str]:
    """English prose that is on every machine: the topics of Python's own help, end to end, cut into equal texts."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    step = len(whole) // count
    return [whole[i * step : (i + 1) * step] for i in range(count)]


def check(
    model: Any, tokenizer: Any, texts: Sequence[str], *, name: str = "", tell: Callable[[str], None]
) -> QualityReport:
    """Measure every lossy codec. Raises ConfigError for a model whose pages cannot be coded, and for short texts."""
    import torch

    shapes = cache_shapes(model)
    if shapes.states:
        raise ConfigError("the model has recurrent states, which are never coded with loss; another model is needed")
    layout = layout_of(CacheShapes(_as_bfloat16(shapes.layers)), BLOCK)
    coders = [_Coded(codec, layout) for codec in LOSSY]
    sums = [[0.0, 0.0, 0] for _ in coders]
    with torch.inference_mode():
        for number, text in enumerate(texts, 1):
            tell(f"text {number} of {len(texts)}")
            ids = tokenizer(text, return_tensors="pt").input_ids[:, : PREFIX + SUFFIX]
            if ids.shape[1] < PREFIX + SUFFIX:
                raise ConfigError(f"text {number} has {ids.shape[1]} tokens; {PREFIX + SUFFIX} are needed")
            kv = _prefix_kv(model, ids[:, :PREFIX])
            base = _after(model, kv, ids[:, PREFIX:])
            for coder, sum_ in zip(coders, sums, strict=True):
                for i, value in enumerate(_compared(base, _after(model, coder.round_trip(kv), ids[:, PREFIX:]))):
                    sum_[i] += value
        tell("needles")
        exact, found = _needles(model, tokenizer, coders)
        tell("the noise floor, in bfloat16")
        floor_kl, floor_top1, floor_tokens = _floor(model, tokenizer, texts[0])
    rows = [Quality("exact", 1.0, 0.0, 1.0, 0.0, exact, None)] + [
        Quality(c.codec.name, c.ratio, kl / n, top / n, c.max_error, hits, GATES[c.codec.name])
        for c, (kl, top, n), hits in zip(coders, sums, found, strict=True)
    ]
    tokens = int(sums[0][2])
    return QualityReport(
        name, floor_kl / floor_tokens, floor_top1 / floor_tokens, len(texts), tokens, len(NEEDLES), tuple(rows)
    )


class _Coded:
    """A codec over the pages of a model's cache."""

    def __init__(self, codec: LossyCodec, layout: Layout) -> None:
        self.codec = codec
        self._groups = layout.groups
        self._quantizers = [quantizer_of(codec, layout, group) for group in range(len(layout.groups))]
        raw = sum(one.page_bytes for one in self._quantizers)
        self.ratio = raw / sum(one.coded_bytes(0) for one in self._quantizers)
        self.max_error = 0.0

    def round_trip(self, kv: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Keys and values, [1, heads, tokens, dim] of each layer, as they come back; a tail below a block is left."""
        back = [(keys.clone(), values.clone()) for keys, values in kv]
        for group, quantizer in zip(self._groups, self._quantizers, strict=True):
            for block in range(kv[group.layers[0]][0].shape[2] // BLOCK):
                span = slice(block * BLOCK, (block + 1) * BLOCK)
                page = b"".join(_bits(t[:, :, span]) for t in _tensors(kv, group))
                skip = int(self.codec.keeps_first and block == 0)
                blob, out = bytearray(quantizer.coded_bytes(skip)), bytearray(len(page))
                self.max_error = max(self.max_error, quantizer.encode(memoryview(page), memoryview(blob), skip))
                quantizer.decode(memoryview(blob), memoryview(out))
                offset = 0
                for tensor in _tensors(back, group):
                    part = tensor[:, :, span]
                    part[...] = _from_bits(out, offset, part.shape)
                    offset += part.numel() * 2
        return back


def _tensors(kv: list[tuple[Any, Any]], group: LayerGroup) -> Iterator[Any]:
    for layer in group.layers:
        yield from kv[layer]


def _bits(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().tobytes()
    return data


def _from_bits(page: bytearray, offset: int, shape: Any) -> Any:
    import torch

    return torch.frombuffer(page, dtype=torch.bfloat16, count=shape.numel(), offset=offset).view(shape).float()


def _as_bfloat16(shapes: Sequence[Any]) -> tuple[Any, ...]:
    from dataclasses import replace

    import torch

    pair = torch.bfloat16, torch.bfloat16
    return tuple(None if shape is None else replace(shape, dtypes=pair) for shape in shapes)


def _prefix_kv(model: Any, ids: Any) -> list[tuple[Any, Any]]:
    """Keys and values of each layer after a prefill, rounded to bfloat16, in float32."""
    import torch

    cache = new_cache(model)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    rounded = [(one.keys.to(torch.bfloat16).float(), one.values.to(torch.bfloat16).float()) for one in cache.layers]
    if any(keys.shape[2] != ids.shape[1] for keys, _ in rounded):
        raise ConfigError(f"the model's cache does not hold {ids.shape[1]} tokens in every layer (a shorter window?)")
    return rounded


def _cache_of(model: Any, kv: list[tuple[Any, Any]]) -> Any:
    cache = new_cache(model)
    for index, (keys, values) in enumerate(kv):
        cache.update(keys.clone(), values.clone(), index)
    return cache


def _after(model: Any, kv: list[tuple[Any, Any]], ids: Any) -> Any:
    """Log probabilities of the next token at each of `ids`, [tokens, vocabulary]."""
    import torch

    output = model(input_ids=ids, past_key_values=_cache_of(model, kv))
    return torch.log_softmax(output.logits[0].float(), dim=-1)


def _compared(base: Any, other: Any) -> tuple[float, float, int]:
    """Sums over tokens of divergence and agreement, and how many tokens there are."""
    kl = (base.exp() * (base - other)).sum(dim=-1)
    same = base.argmax(dim=-1) == other.argmax(dim=-1)
    return float(kl.sum()), float(same.sum()), int(same.numel())


def needle_prompt(tokenizer: Any, city: str, number: int, text: str) -> Any:
    """A text that tells a number at its begin only, [1, PREFIX]: in whole blocks, so all of it is coded."""
    return tokenizer(f"The access code of the office in {city} is {number}.\n{text}", return_tensors="pt").input_ids[
        :, :PREFIX
    ]


def _needles(model: Any, tokenizer: Any, coders: Sequence[_Coded]) -> tuple[int, list[int]]:
    """How many numbers the model finds with exact pages, and with those of each codec."""
    filler = usual_texts(len(NEEDLES))
    exact, found = 0, [0] * len(coders)
    for (city, number), text in zip(NEEDLES, filler, strict=True):
        prefix = needle_prompt(tokenizer, city, number, text)
        ask = f"\nThe access code of the office in {city} is"
        question = tokenizer(ask, return_tensors="pt", add_special_tokens=False).input_ids
        kv = _prefix_kv(model, prefix)
        exact += str(number) in _answer(model, tokenizer, kv, question)
        for i, coder in enumerate(coders):
            found[i] += str(number) in _answer(model, tokenizer, coder.round_trip(kv), question)
    return exact, found


def _answer(model: Any, tokenizer: Any, kv: list[tuple[Any, Any]], ids: Any) -> str:
    cache, answer = _cache_of(model, kv), []
    for _ in range(ANSWER_TOKENS):
        ids = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)
        answer.append(int(ids))
    return str(tokenizer.decode(answer))


def _floor(model: Any, tokenizer: Any, text: str) -> tuple[float, float, int]:
    """The model in float32 and in bfloat16, on the same tokens."""
    import torch

    ids = tokenizer(text, return_tensors="pt").input_ids[:, :FLOOR_TOKENS]
    base = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    other = model.to(torch.bfloat16)
    try:
        return _compared(base, torch.log_softmax(other(input_ids=ids).logits[0].float(), dim=-1))
    finally:
        model.to(torch.float32)
