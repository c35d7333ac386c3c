"""Decoding behind an image and a long conversation: tokens a second and cache bytes, ML-Mamba and a transformer.

    python benchmarks/models/ml_mamba_decode.py                    about two minutes; use one thread on a busy machine
    python benchmarks/models/ml_mamba_decode.py --contexts 729 4096 --size 370m

All have random weights in the same dtype, preallocated caches filled with noise, weights on large pages, products of
one row by the same kernel (decode_linear), and the same loop; models and contexts take turns token by token, so that a
busy moment of the machine hits all of them.  The transformer runs twice: with torch's attention, and with
mma_attention, which reads its cache once for all heads that share a key.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmkernels.demo.report import machine_facts
from mmkernels.demo.scaling import cache_bytes, prepared_cache
from mmkernels.interop.mma_halves import NAME
from mmkernels.layers import place_for_decode
from mmkernels.models.mamba2 import Mamba2LMConfig
from mmkernels.models.ml_mamba import MLMambaConfig, MLMambaForConditionalGeneration, PatchVisionConfig
from mmkernels.ops.decode_linear.api import decode_linear

HERE = Path(__file__).resolve().parent
CONTEXTS = (729, 2916, 11_664, 46_656, 103_000)  # the image alone, then fourfold; 103k is where others stop
FLAT = 0.97  # decoding rate at the longest context over that at the shortest
OURS = "ML-Mamba"
_OFTEN = 4  # tokens of ML-Mamba in a round
ATTENTION = {"transformer, torch's attention": "sdpa", "transformer, mma_attention": NAME}


def ml_mamba(size: str, dtype: torch.dtype) -> MLMambaForConditionalGeneration:
    """The official language model of a size; a tower of patches, since decoding does not look at images."""
    text = Mamba2LMConfig.official(size)
    patches = PatchVisionConfig(hidden_size=64, image_size=384, patch_size=14)
    torch.manual_seed(0)
    return MLMambaForConditionalGeneration(MLMambaConfig(text_config=text, vision_config=patches)).to(dtype).eval()


class ServedLinear(nn.Linear):
    """A product of one row as our own models make it: several times as fast as nn.Linear in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        return decode_linear(input, self.weight)


def transformer(like: Mamba2LMConfig, dtype: torch.dtype, attention: str) -> LlamaForCausalLM:
    """A decoder of as many parameters: half the blocks at the same width, tied tables, a third of the heads for keys.

    Few key heads keep its cache small: with as many as query heads it would read three times as much.
    """
    width, head = like.hidden_size, 64
    heads = width // head
    config = LlamaConfig(
        vocab_size=like.padded_vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=like.num_hidden_layers // 2,
        num_attention_heads=heads,
        num_key_value_heads=max(n for n in range(1, heads // 3 + 1) if heads % n == 0),
        head_dim=head,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).to(dtype).eval()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ServedLinear
    return model


def count(model: Any) -> int:
    """Parameters that a token of decoding reads."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("vision_tower", "connector")))


def measure(models: dict[str, Any], contexts: list[int], repeats: int, warmup: int = 3) -> list[dict[str, Any]]:
    """A row for each context: {"context", model: (median milliseconds of a token, bytes of its cache)}.

    In a round ML-Mamba makes several tokens at each context, there and back, since a ratio near 1 is asked of it; the
    transformer, whose ratios are far from it, makes one.
    """
    room = _OFTEN * (warmup + repeats) + 2
    caches: dict[tuple[str, int], Any] = {}
    for context in contexts:
        caches[OURS, context] = prepared_cache(models[OURS], context, room)
        shared = prepared_cache(models[next(iter(ATTENTION))], context, room)  # one for both ways of attending
        caches |= {(name, context): shared for name in ATTENTION}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
    token = torch.zeros(1, 1, dtype=torch.long)
    ours = [(OURS, context) for context in contexts]
    there_and_back = [*ours, *reversed(ours)] * (_OFTEN // 2)
    one_round = [*there_and_back, *(key for key in caches if key[0] != OURS)]
    for _, (name, context) in itertools.product(range(warmup + repeats), one_round):
        cache = caches[name, context]
        position = torch.full((1, 1), int(cache.get_seq_length()), dtype=torch.long)
        started = time.perf_counter()
        models[name](input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        times[name, context].append(1e3 * (time.perf_counter() - started))
    return [
        {
            "context": context,
            **{
                n: (
                    statistics.median(times[n, context][len(times[n, context]) * warmup // (warmup + repeats) :]),
                    cache_bytes(caches[n, context]),
                )
                for n in models
            },
        }
        for context in contexts
    ]


def table(rows: list[dict[str, Any]], sizes: dict[str, int], facts: str) -> str:
    """The table and what it says."""
    names = list(sizes)
    lines = ["| context | " + " | ".join(f"{name}, tokens/s | its cache" for name in names) + " |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for row in rows:
        cells = [f"{1e3 / row[name][0]:.1f} | {row[name][1] / 2**20:,.1f} MiB" for name in names]
        lines.append(f"| {row['context']:,} | {' | '.join(cells)} |")
    first, last = rows[0], rows[-1]
    ratio = {name: first[name][0] / last[name][0] for name in names}
    verdict = "met" if ratio[OURS] >= FLAT else "NOT met"
    return f"""# Decoding after a long context: ML-Mamba and a transformer with a key/value cache

{facts}

{chr(10).join(lines)}

Rate at {last["context"]:,} over rate at {first["context"]:,}, target {FLAT} for {OURS} ({verdict}):
{"; ".join(f"{name} {value:.3f}" for name, value in ratio.items())}.

One sequence, one token at a time; medians of interleaved steps. Parameters read for a token:
{", ".join(f"{name} {total:,}" for name, total in sizes.items())}.
The context is noise: the speed of no model depends on what is in its cache. ML-Mamba's states have one size; what grows
is one byte a word, by which `generate` counts them.
"""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="130m", help="of the official Mamba-2 language models")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--table", type=Path, default=HERE.parent / "results" / "ml_mamba_decode.md")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    ours = ml_mamba(arguments.size, dtype)
    models: dict[str, Any] = {OURS: ours}
    models |= {name: transformer(ours.config.text_config, dtype, kind) for name, kind in ATTENTION.items()}
    for name, model in models.items():
        print(f"{name}: {place_for_decode(model)}", file=sys.stderr)
    machine = machine_facts()
    facts = (
        f"{machine['processor']}, {machine['cores']} cores, {torch.get_num_threads()} threads, {arguments.dtype}; "
        f"torch {machine['torch']}.\n\n    {' '.join(['python benchmarks/models/ml_mamba_decode.py', *sys.argv[1:]])}"
    )
    rows = measure(models, arguments.contexts, arguments.repeats)
    text = table(rows, {name: count(model) for name, model in models.items()}, facts)
    arguments.table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
