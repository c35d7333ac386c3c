"""What pruning visual tokens saves at real shapes: the encoder of CLIP ViT-L/14-336, the decoder of LLaVA-1.5-7B.

    python benchmarks/models/pruning_speed.py            random weights; some three minutes on two quiet cores
    python benchmarks/models/pruning_speed.py --quick    small shapes, a sample each: whether it runs

Writes pruning_speed.md and pruning_speed.png into --results, again after every part.  Contestants take turns
(mmkernels.bench.harness: medians of interleaved samples) after their results were compared.  The decoder is one layer,
times 32.
"""

import argparse
import copy
import dataclasses
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pruning_speed_report as report
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaModel

from mmkernels import cls_attention_scores, get_pruner
from mmkernels.bench.harness import Timing, local_sampler, race
from mmkernels.interop.prune_tower import Tower, tap_of, vit
from mmkernels.pruning import Encoder, Pruned, Tap, TokenPruner, VisionInputs

HERE = Path(__file__).resolve().parent
# Scores are sums over K = 3 layers of float32 softmax rows, 1/577 each; the tower's attention adds in another order.
SCORES_AGREE = 1e-5
FEATURES_AGREE = 2e-4  # relative to their norm: 23 layers of float32 in two orders of adding


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes of one run."""

    width: int = 1024
    mlp: int = 4096
    heads: int = 16
    layers: int = 24
    image: int = 336
    patch: int = 14
    keep: int = 64
    decoder_width: int = 4096
    decoder_mlp: int = 11008
    decoder_heads: int = 32
    decoder_layers: int = 32
    visual: tuple[int, ...] = (576, 256, 192, 128, 64)
    text: int = 60
    rounds: int = 5
    budget: float = 75.0  # seconds of the longest race
    shortest: float = 0.02

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


QUICK = Shapes(
    width=64, mlp=128, heads=4, layers=4, image=84, keep=9, decoder_width=128, decoder_mlp=256, decoder_heads=4,
    decoder_layers=2, visual=(36, 16, 9), text=6, rounds=1, budget=4.0, shortest=0.001,
)  # fmt: skip


@dataclasses.dataclass
class Encoders:
    """One set of random weights behind two attention implementations, and what prunes."""

    eager: Any
    sdpa: Any
    tower: Tower
    pruner: TokenPruner
    encoder: Encoder
    pixels: Tensor

    @property
    def feature_layer(self) -> int:
        """The layer whose output is handed on."""
        return self.encoder.feature_layer


def build_encoders(shapes: Shapes) -> Encoders:
    """The two towers and an image."""
    config = CLIPVisionConfig(
        hidden_size=shapes.width,
        intermediate_size=shapes.mlp,
        num_attention_heads=shapes.heads,
        num_hidden_layers=shapes.layers,
        image_size=shapes.image,
        patch_size=shapes.patch,
    )
    torch.manual_seed(0)
    sdpa = CLIPVisionModel._from_config(config, attn_implementation="sdpa").eval()
    with torch.device("meta"):
        # a model keeps the configuration it gets, implementation and all: one for each
        eager = CLIPVisionModel._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(sdpa.state_dict(), assign=True)
    for name, buffer in sdpa.named_buffers():  # position ids are not in the state
        owner, _, leaf = name.rpartition(".")
        setattr(eager.get_submodule(owner), leaf, buffer)
    tower = vit(sdpa)
    encoder = tower.encoder(shapes.layers - 2, (shapes.side, shapes.side))
    pixels = torch.randn(1, 3, shapes.image, shapes.image)
    return Encoders(eager, sdpa, tower, get_pruner("vtc_cls", num_keep=shapes.keep), encoder, pixels)


def official(on: Encoders) -> tuple[Tensor, Tensor]:
    """As published: every attention map and every hidden state, of which three rows and one state are used."""
    seen = on.eager(on.pixels, output_attentions=True, output_hidden_states=True)
    count = len(on.pruner.taps(on.encoder))
    rows = torch.stack([maps[:, :, 0, 1:].mean(1) for maps in seen.attentions[-1 - count : -1]]).sum(0)
    kept = rows.topk(on.pruner.num_keep or 1).indices.sort(-1).values
    features = seen.hidden_states[-2][:, 1:]
    return rows, features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


def plain(on: Encoders) -> Tensor:
    """The tower as LLaVA runs it, SDPA, nothing pruned: all layers and all hidden states."""
    return on.sdpa(on.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def stopped(on: Encoders) -> Tensor:
    """The tower up to the layer that is handed on, nothing pruned."""
    seen = on.tower.run(on.pixels, num_tokens=on.encoder.grid[0] ** 2, layers=(on.feature_layer,))
    return seen.hidden[on.feature_layer][:, 1:]


def ours(on: Encoders) -> tuple[Tensor, Pruned]:
    """What mmkernels.prune runs: the same, three rows of scores taken along, and the choice."""
    taps = on.pruner.taps(on.encoder)
    seen = on.tower.run(on.pixels, num_tokens=on.encoder.grid[0] ** 2, layers=(on.feature_layer,), taps=taps)
    hidden = seen.hidden[on.feature_layer]
    inputs = VisionInputs(hidden[:, 1:], on.encoder.grid, hidden[:, :1], seen.taps)
    return on.pruner.score(inputs), on.pruner(inputs)  # type: ignore[attr-defined]


def check_encoders(on: Encoders) -> dict[str, float]:
    """Compare scores, choice and features before anything is timed."""
    implementations = on.eager.config._attn_implementation, on.sdpa.config._attn_implementation
    if implementations != ("eager", "sdpa"):
        raise AssertionError(f"the towers run {implementations} instead of eager and SDPA attention")
    (theirs, _), (scores, pruned) = official(on), ours(on)
    error = float((theirs - scores).abs().max())
    if error > SCORES_AGREE:
        raise AssertionError(f"scores differ by {error:.1e} from those of the whole maps")
    same = plain(on)
    if not torch.equal(stopped(on), same):
        raise AssertionError("stopping behind the feature layer changed its features")
    if not torch.equal(pruned.tokens, same.gather(1, pruned.indices[..., None].expand_as(pruned.tokens))):
        raise AssertionError("kept tokens are not those of the unpruned tower")
    whole = on.eager(on.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    apart = float((whole - same).norm() / same.norm())
    if apart > FEATURES_AGREE:
        raise AssertionError(f"features of eager and SDPA attention differ by {apart:.1e} of their norm")
    chosen = theirs.topk(pruned.indices.shape[1]).indices
    both = len(set(chosen[0].tolist()) & set(pruned.indices[0].tolist()))
    return {"scores_error": error, "jaccard": both / (2 * chosen.shape[1] - both)}


def peak_bytes(run: Callable[[], Any], folder: Path) -> int:
    """Most bytes of tensors that a call had allocated at one time, by torch's own allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    return report.peak_of_trace(profiler, folder)


def _keep(made: dict[Any, Tensor], module: Any, _args: Any, output: Tensor) -> None:
    made[module] = output


def ready_queries_and_keys(on: Encoders) -> dict[Tap, tuple[Tensor, Tensor, float]]:
    """Queries and keys of the scoring layers, as their projections hand them on."""
    found: dict[Tap, tuple[Tensor, Tensor, float]] = {}
    for tap in on.pruner.taps(on.encoder):
        at = on.tower.projections[tap.layer]
        made: dict[Any, Tensor] = {}
        keep = partial(_keep, made)
        handles = [module.register_forward_hook(keep) for module in (at.query, at.key)]
        on.sdpa(on.pixels)
        for handle in handles:
            handle.remove()
        found[tap] = (*at.split(made[at.query], made[at.key]), at.scale)
    return found


def whole_maps(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A layer's attention map as eager attention makes it, from ready queries and keys, and the row of it."""
    logits = (q.transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=torch.float32)[:, :, 0, 1:].mean(1)


def race_encoders(shapes: Shapes, threads: int, folder: Path) -> dict[str, Any]:
    """Time and memory of the towers, and of the scores alone."""
    on = build_encoders(shapes)
    facts: dict[str, Any] = {"checks": check_encoders(on), "keep": shapes.keep}
    runs = {"official": official, "plain": plain, "stopped": stopped, "ours": ours}
    facts["peak"] = {name: peak_bytes(lambda run=run: run(on), folder) for name, run in runs.items()}
    tokens = shapes.side**2 + 1
    facts["map_bytes"] = shapes.layers * shapes.heads * tokens * tokens * 4
    facts["time"] = race(
        {name: local_sampler(lambda run=run: run(on)) for name, run in runs.items()},
        threads=threads, rounds=shapes.rounds, budget=shapes.budget, shortest=shapes.shortest,
    )  # fmt: skip

    ready = ready_queries_and_keys(on)
    features = plain(on)
    rows = {tap: (q[:, :1], k, scale) for tap, (q, k, scale) in ready.items()}

    def scores() -> None:
        for q, k, scale in rows.values():
            cls_attention_scores(q, k, scale=scale)

    def scores_and_choice() -> None:
        taps = {tap: tap_of(tap, q, k, scale, 1) for tap, (q, k, scale) in ready.items()}
        on.pruner(VisionInputs(features, on.encoder.grid, taps=taps))

    for tap, (q, k, scale) in ready.items():
        torch.testing.assert_close(tap_of(tap, q, k, scale, 1), whole_maps(q, k, scale), rtol=1e-4, atol=1e-6)
    facts["scores"] = race(
        {
            "rows": local_sampler(scores),
            "rows and choice": local_sampler(scores_and_choice),
            "maps of those layers": local_sampler(lambda: [whole_maps(*given) for given in ready.values()]),
        },
        threads=threads, rounds=shapes.rounds, budget=shapes.budget / 5, shortest=shapes.shortest,
    )  # fmt: skip
    facts["score_layers"], facts["layers"] = len(ready), shapes.layers
    return facts


def flops(shapes: Shapes, tokens: int, *, fastv: bool = False) -> float:
    """Of the decoder's prefill over so many tokens.

    FastV's convention: 4 n d^2 + 2 n^2 d + 2 n d m a layer, one for a multiply-add and two matrices in the MLP.  True:
    2 for a multiply-add, three matrices (a gated MLP), the whole square of attention.
    """
    n, d, m = tokens, shapes.decoder_width, shapes.decoder_mlp
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m if fastv else 8 * n * d * d + 4 * n * n * d + 6 * n * d * m
    return float(layer * shapes.decoder_layers)


def build_layer(shapes: Shapes) -> tuple[Any, LlamaConfig]:
    """A decoder of one layer with random weights."""
    config = LlamaConfig(
        hidden_size=shapes.decoder_width,
        intermediate_size=shapes.decoder_mlp,
        num_attention_heads=shapes.decoder_heads,
        num_hidden_layers=1,
        vocab_size=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaModel._from_config(config, attn_implementation="sdpa").eval(), config


def check_layer(model: Any, config: LlamaConfig, shapes: Shapes) -> None:
    """A step on a cache must say what prefill says: the cached tokens are all there is to decoding."""
    hidden = torch.randn(1, shapes.visual[-1] + shapes.text, shapes.decoder_width)
    whole = model(inputs_embeds=hidden).last_hidden_state[:, -1]
    cache = DynamicCache(config=config)
    model(inputs_embeds=hidden[:, :-1], past_key_values=cache, use_cache=True)
    last = model(inputs_embeds=hidden[:, -1:], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


def race_decoder(shapes: Shapes, threads: int) -> dict[str, Any]:
    """Prefill, KV bytes and decoding of one layer against the number of visual tokens."""
    model, config = build_layer(shapes)
    check_layer(model, config, shapes)
    prefill, step, attention, kv = {}, {}, {}, {}
    for visual in shapes.visual:
        length = visual + shapes.text
        hidden = torch.randn(1, length, shapes.decoder_width)
        cache = DynamicCache(config=config)
        model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
        keys, values = cache.layers[0].keys, cache.layers[0].values
        # half precision, as the model is served
        kv[visual] = (keys.numel() + values.numel()) * 2 * shapes.decoder_layers
        keys, values = keys.clone(), values.clone()
        query = torch.randn(1, shapes.decoder_heads, 1, keys.shape[-1])

        def fill(hidden: Tensor = hidden) -> None:
            model(inputs_embeds=hidden, past_key_values=DynamicCache(config=config), use_cache=True)

        def one(cache: DynamicCache = cache, last: Tensor = hidden[:, -1:]) -> None:
            model(inputs_embeds=last, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        def attend(query: Tensor = query, keys: Tensor = keys, values: Tensor = values) -> None:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values)

        prefill[visual], step[visual], attention[visual] = map(local_sampler, (fill, one, attend))
    common: dict[str, Any] = {"threads": threads, "rounds": shapes.rounds, "shortest": shapes.shortest}

    def timed(samplers: dict[int, Any], budget: float) -> dict[int, Timing]:
        named = race({str(visual): sampler for visual, sampler in samplers.items()}, budget=budget, **common)
        return {int(name): timing for name, timing in named.items()}

    return {
        "prefill": timed(prefill, shapes.budget * 0.8),
        "step": timed(step, shapes.budget / 5),
        "attention": timed(attention, shapes.budget / 10),
        "kv": kv,
        "true": {v: flops(shapes, v + shapes.text) for v in shapes.visual},
        "true_visual": {v: flops(shapes, v) for v in shapes.visual},
        "fastv_visual": {v: flops(shapes, v, fastv=True) for v in shapes.visual},
        "layers": shapes.decoder_layers,
        "text": shapes.text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, one sample each: a test, not a result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = QUICK if arguments.quick else Shapes()
    started = time.perf_counter()
    results: dict[str, Any] = {
        "shapes": shapes,
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {report.processor()}, torch {torch.__version__}",
        "command": " ".join(["python benchmarks/models/pruning_speed.py", *sys.argv[1:]]),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for part, make in (
            ("encoder", lambda: race_encoders(shapes, arguments.threads, arguments.results)),
            ("decoder", lambda: race_decoder(shapes, arguments.threads)),
        ):
            results[part] = make()
            results["seconds"] = time.perf_counter() - started
            report.write(results, arguments.results)
    print((arguments.results / "pruning_speed.md").read_text())


if __name__ == "__main__":
    main()
