"""Prefill and decoding of Mamba-2 language models: this package, transformers and llama.cpp on the same random weights.

    python benchmarks/models/bench_mamba2.py --models 130m:float32 130m:bfloat16 1.3b:bfloat16 --table out.md

Contestants take turns in one process (mmkernels.bench.harness: medians of interleaved samples, dirty ones dropped),
after their logits were compared.  transformers races twice, once in a child whose allocator is told to keep its memory
(mmkernels.bench.worker); llama.cpp, where `llama_cpp` and `gguf` are installed, reads a GGUF file written here from the
same weights.  "of read" is the rate at which weights and states were read, over a plain read on 2 MiB pages in the
same race.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

from mmkernels.bench.harness import local_sampler, race
from mmkernels.bench.limits import WORK, limit
from mmkernels.bench.worker import TUNED
from mmkernels.layers import place_for_decode
from mmkernels.models.mamba2 import Mamba2LMConfig, Mamba2LMForCausalLM

alive: list[Any] = []  # what llama.cpp goes on using
DECODED = 8  # tokens of one decode sample
CHECKED = 64  # tokens whose last logits are compared
# Distance of logits from our float32 ones, relative to their norm.  float32: sums of thousands of products in other
# orders through 24 to 48 blocks.  bfloat16: some 5 roundings of 2^-9 a block, added in quadrature, twice over.
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.1}


@dataclasses.dataclass
class Contestant:
    """A model that is ready: last logits of a prompt, prefill from nothing, and some tokens on a warm state."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    prefill: Callable[[torch.Tensor], Any]
    decode: Callable[[], Any]


def ours(model: Mamba2LMForCausalLM) -> Contestant:
    """Our model, weights on large pages."""
    print("  mmkernels:", place_for_decode(model), file=sys.stderr)
    warm = DynamicCache(config=model.config)
    model(torch.zeros(1, 4, dtype=torch.long), past_key_values=warm)
    one = torch.zeros(1, 1, dtype=torch.long)
    states = torch.zeros(1, model.config.hidden_size, dtype=model.lm_head.weight.dtype)
    for block in model.backbone.layers:
        why = block.objections_to_one_call(states)
        assert not why, f"a benchmark must not fall back: {why}"

    def decode() -> None:
        for _ in range(DECODED):
            model(one, past_key_values=warm)

    return Contestant(
        lambda ids: model(ids, logits_to_keep=1, use_cache=False).logits[0, -1],
        lambda ids: model(ids, logits_to_keep=1, use_cache=True),
        decode,
    )


def transformers(model: Mamba2LMForCausalLM) -> Contestant:
    """transformers' model with the same weights, at its defaults."""
    config = model.config
    twin = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            tie_word_embeddings=True,
        )
    )
    twin = twin.to(model.lm_head.weight.dtype).eval()
    twin.load_state_dict({k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()})
    cache = twin(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache_params
    one = torch.zeros(1, 1, dtype=torch.long)

    def decode() -> None:
        for _ in range(DECODED):
            twin(one, cache_params=cache, use_cache=True)

    return Contestant(
        lambda ids: twin(ids, logits_to_keep=1, use_cache=False).logits[0, -1, : config.vocab_size],
        lambda ids: twin(ids, logits_to_keep=1, use_cache=True),
        decode,
    )


def write_gguf(model: Mamba2LMForCausalLM, path: Path) -> None:
    """The weights in llama.cpp's format: matrices in the model's dtype, everything small in float32."""
    import gguf

    config, weight = model.config, model.lm_head.weight
    writer = gguf.GGUFWriter(str(path), "mamba2")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.expand * config.hidden_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if weight.dtype == torch.float32 else kinds.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, value: torch.Tensor) -> None:
        if value.dtype == torch.float32:
            writer.add_tensor(name, value.numpy())
        else:
            raw = value.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def small(name: str, value: torch.Tensor) -> None:
        writer.add_tensor(name, value.float().contiguous().numpy())

    matrix("token_embd.weight", model.backbone.embedding.weight)
    small("output_norm.weight", model.backbone.norm_f.weight)
    for i, block in enumerate(model.backbone.layers):
        mixer, prefix = block.mixer, f"blk.{i}."
        small(f"{prefix}attn_norm.weight", block.norm.weight)
        matrix(f"{prefix}ssm_in.weight", mixer.in_proj.weight)
        small(f"{prefix}ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1))
        small(f"{prefix}ssm_conv1d.bias", mixer.conv1d.bias)
        small(f"{prefix}ssm_dt.bias", mixer.dt_bias)
        small(f"{prefix}ssm_a", -mixer.A_log.float().exp()[:, None])
        small(f"{prefix}ssm_d", mixer.D[:, None])
        small(f"{prefix}ssm_norm.weight", mixer.norm.weight.view(config.n_groups, -1))
        matrix(f"{prefix}ssm_out.weight", mixer.out_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: Mamba2LMForCausalLM, folder: Path, threads: int, longest: int) -> Contestant:
    """llama.cpp on a GGUF file of the same weights, at its defaults but for the sizes of the context."""
    import llama_cpp as lc

    path = folder / "model.gguf"
    write_gguf(model, path)
    quiet = lc.llama_log_callback(lambda level, text, user: None)
    lc.llama_log_set(quiet, ctypes.c_void_p(0))
    loaded = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
    assert loaded, f"llama.cpp does not read {path}"
    parameters = lc.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 2 * longest, longest, 512
    parameters.n_threads = parameters.n_threads_batch = threads
    context = lc.llama_init_from_model(loaded, parameters)
    assert context, "llama.cpp makes no context"
    alive.extend((quiet, loaded))

    def run(ids: torch.Tensor) -> None:
        tokens = (ctypes.c_int32 * ids.numel())(*ids.flatten().tolist())
        status = lc.llama_decode(context, lc.llama_batch_get_one(tokens, ids.numel()))
        assert status == 0, f"llama_decode: {status}"
        lc.llama_synchronize(context)

    def prefill(ids: torch.Tensor) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        run(ids)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        prefill(ids)
        values = lc.llama_get_logits_ith(context, -1)
        return torch.tensor(values[: model.config.vocab_size])

    one = torch.zeros(1, dtype=torch.long)

    def decode() -> None:
        for _ in range(DECODED):
            run(one)

    return Contestant(logits, prefill, decode)


def installed(*modules: str) -> bool:
    """Whether every module can be found."""
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in modules)


def read_bytes(model: Mamba2LMForCausalLM) -> int:
    """Bytes a token moves: every weight once (the tied table as head), recurrent states there and back."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    states = config.num_hidden_layers * config.expand * config.hidden_size * config.state_size * 4
    return weights + 2 * states


def check(contestants: dict[str, Contestant], exact: torch.Tensor, ids: torch.Tensor, dtype: str) -> dict[str, float]:
    """Distances of everybody's last logits from float32 ones; too far is an error."""
    distances = {}
    for name, contestant in contestants.items():
        got = contestant.logits(ids).float()
        distances[name] = ((got - exact).norm() / exact.norm()).item()
        assert distances[name] <= AGREEMENT[dtype], f"{name} is wrong: {distances[name]:.3g} from float32 logits"
    print("  distance from float32 logits:", {k: float(f"{v:.2g}") for k, v in distances.items()}, file=sys.stderr)
    return distances


@torch.inference_mode()
def measure(name: str, lengths: list[int], rounds: int, only: list[str], budget: float) -> list[dict[str, Any]]:
    """Rows of one model, e.g. "130m:bfloat16"."""
    size, dtype = name.split(":")
    threads = torch.get_num_threads()
    print(f"{name}, {threads} threads", file=sys.stderr)
    torch.manual_seed(0)
    model = Mamba2LMForCausalLM(Mamba2LMConfig.official(size)).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, max(lengths)), generator=torch.Generator().manual_seed(0))
    model = model.to(getattr(torch, dtype))
    for block in model.backbone.layers:  # as from_pretrained loads them
        for parameter in (block.mixer.A_log, block.mixer.dt_bias, block.mixer.D):
            parameter.data = parameter.data.float()
    wide = Mamba2LMForCausalLM(model.config).eval()
    wide.load_state_dict(model.state_dict())
    exact = wide(ids[:, :CHECKED], logits_to_keep=1, use_cache=False).logits[0, -1]
    del wide
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        contestants = {}
        if "mmkernels" in only:
            contestants["mmkernels"] = ours(model)
        if "transformers" in only:
            contestants["transformers"] = transformers(model)
        if "llama.cpp" in only and installed("llama_cpp", "gguf"):
            contestants["llama.cpp"] = llama_cpp(model, Path(folder), threads, max(lengths))
        check(contestants, exact, ids[:, :CHECKED], dtype)
        for length in lengths:
            prompt = ids[:, :length]
            runs = {k: local_sampler(lambda c=c, p=prompt: c.prefill(p)) for k, c in contestants.items()}
            for who, timing in race(runs, threads=threads, rounds=rounds, budget=budget).items():
                rows.append(row(name, f"prefill {length}", who, length / timing.seconds, timing.marks))
        runs = {k: local_sampler(c.decode, DECODED) for k, c in contestants.items()}
        runs["read"] = local_sampler(limit("read"))
        timings = race(runs, threads=threads, rounds=rounds, budget=budget)
        rate = WORK["read"] / timings["read"].seconds
        for who in contestants:
            timing = timings[who]
            share = read_bytes(model) / timing.seconds / 1e9 / rate
            rows.append(row(name, "decode", who, 1 / timing.seconds, timing.marks, share))
    return rows


def row(model: str, what: str, who: str, speed: float, marks: str, share: float | None = None) -> dict[str, Any]:
    """One figure: tokens a second."""
    return {"model": model, "what": what, "who": who, "tokens": speed, "marks": marks, "of read": share}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the last column is how many times faster mmkernels is in the same process."""
    lines = ["| model | what | who | tokens/s | of read | mmkernels is faster by |", "|---|---|---|---|---|---|"]
    for r in rows:
        tuned = r["who"].endswith("tuned malloc")
        base = "mmkernels, tuned malloc" if tuned else "mmkernels"
        mine = next(o for o in rows if (o["model"], o["what"], o["who"]) == (r["model"], r["what"], base))
        ratio = "" if r["who"] == base else f"{mine['tokens'] / r['tokens']:.2f}x"
        share = "" if r["of read"] is None else f"{100 * r['of read']:.0f}%"
        lines.append(f"| {r['model']} | {r['what']} | {r['who']} | {r['tokens']:.1f}{r['marks']} | {share} | {ratio} |")
    return "\n".join(lines) + "\n\n! no clean sample, ~ wide spread (mmkernels.bench.harness)\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens a second, one panel per model and kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = list(dict.fromkeys((r["model"], r["what"]) for r in rows))
    figure, axes = plt.subplots(len(cells), 1, figsize=(8, 1.3 * len(cells)), squeeze=False)
    for axis, cell in zip(axes[:, 0], cells, strict=True):
        mine = [r for r in rows if (r["model"], r["what"]) == cell][::-1]
        colors = ["#00796b" if r["who"].startswith("mmkernels") else "#b0bec5" for r in mine]
        bars = axis.barh([r["who"] for r in mine], [r["tokens"] for r in mine], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(f"mamba2-{cell[0].replace(':', ', ')}: {cell[1]}, tokens/s", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def tuned_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """mmkernels and transformers once more, in a child whose allocator keeps its memory."""
    command = [sys.executable, __file__, "--json", "--no-tuned", "--only", "mmkernels", "transformers"]
    command += ["--models", *arguments.models, "--lengths", *map(str, arguments.lengths)]
    command += ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    command += ["--budget", str(arguments.budget)]
    done = subprocess.run(command, env={**os.environ, **TUNED}, stdout=subprocess.PIPE, text=True, check=True)
    return [{**r, "who": f"{r['who']}, tuned malloc"} for r in json.loads(done.stdout)]


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["130m:float32", "130m:bfloat16", "1.3b:bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="of the prompts")
    parser.add_argument("--rounds", type=int, default=5, help="clean samples of each contestant")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=["mmkernels", "transformers", "llama.cpp"])
    parser.add_argument("--no-tuned", action="store_true", help="leave out the child with the tuned allocator")
    parser.add_argument("--json", action="store_true", help="print rows, not a table")
    parser.add_argument("--table", type=Path, help="also write the table here")
    parser.add_argument("--plot", type=Path, help="also write a plot here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = (arguments.lengths, arguments.rounds, arguments.only, arguments.budget)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure(name, *options)
        if arguments.table:  # what is there stays there, whatever becomes of the next model
            arguments.table.write_text(table(rows))
    if arguments.json:
        print(json.dumps(rows))
        return
    if not arguments.no_tuned:
        rows += tuned_rows(arguments)
    text = table(sorted(rows, key=lambda r: (arguments.models.index(r["model"]), r["what"] == "decode")))
    print(text)
    if arguments.table:
        arguments.table.write_text(text)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
