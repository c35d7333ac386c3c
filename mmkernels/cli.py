"""The `mmkernels` command, in plain argparse; heavy imports on demand."""

import argparse
import ast
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmkernels.errors import ConfigError, MMKernelsError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status (2 for a mistake in the input)."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except MMKernelsError as error:
        print(f"mmkernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from mmkernels import __version__
    from mmkernels.bench import command

    parser = argparse.ArgumentParser(prog="mmkernels", description="Make multimodal LLMs cheap, and measure it.")
    parser.add_argument("--version", action="version", version=f"mmkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, native library, backends of every op and why not the rest")
    info.add_argument("--build", action="store_true", help="compile the native library now rather than at first use")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="train small models on real scans and measure them (2 to 5 minutes)")
    demo.add_argument(
        "--task",
        choices=tuple(_DEMOS),
        default="linear",
        help="linear: a teacher is made linear; mma: images that read the question, against other ways of attending; "
        "ml-mamba: a Mamba-2 model learns to see through a scan connector; pruning: which visual tokens to keep",
    )
    demo.add_argument("--out", type=Path, help="folder for what is written; default out, or out/TASK for other tasks")
    demo.add_argument("--source", "--data", default="digits", help='"digits" or a folder with MNIST-format idx files')
    demo.add_argument("--labels", default="digits", help='names of the labels: "digits" or "fashion"')
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a tenth of the steps: a smoke test, not a result")
    demo.add_argument("--no-controls", action="store_true", help="leave out the two control models (--task linear)")
    demo.add_argument("--seeds", type=int, help="how many seeds, from --seed on (--task mma; default 1)")
    demo.add_argument(
        "--steps", type=int, help="training steps: of every arm (mma), of each stage (ml-mamba), in all (pruning)"
    )
    demo.add_argument("--arms", help="comma-separated: which arms (mma; default all), which connector (ml-mamba)")
    demo.set_defaults(run=_demo)

    _add_prune(commands)

    generate = commands.add_parser("generate", help="ask a saved model about an image")
    generate.add_argument(
        "--model", type=Path, required=True, help="folder written by save_pretrained, e.g. out/linear"
    )
    generate.add_argument("--image", type=Path, required=True, help="any image file")
    generate.add_argument("--question", required=True, help='e.g. "what is in the topleft ?"')
    generate.add_argument(
        "--max-new-tokens", type=int, default=None, help="default: what the model's configuration says"
    )
    generate.set_defaults(run=_generate)

    distill = commands.add_parser("distill", help="run a distillation recipe on a saved teacher")
    distill.add_argument(
        "--config", type=Path, required=True, help="recipe YAML, e.g. models/mmmamba/recipes/demo.yaml"
    )
    distill.add_argument("--teacher", type=Path, default=Path("out/teacher"), help="folder written by save_pretrained")
    distill.add_argument("--out", type=Path, required=True, help="folder for checkpoints, metrics and the student")
    distill.add_argument("--source", default="digits", help="task data, as for demo")
    distill.add_argument("--labels", default="digits", help="names of the labels, as for demo")
    distill.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    distill.set_defaults(run=_distill)

    convert = commands.add_parser("convert", help="convert mmMamba, AKI, ML-Mamba and LLaVA-1.5 checkpoints, both ways")
    convert.add_argument("--model", default="mmmamba", choices=tuple(_CONVERTERS), help="whose checkpoint it is")
    convert.add_argument("source", type=Path, nargs="+", help="file or folder; training files stage by stage")
    convert.add_argument("destination", type=Path, help="folder (or .pt file) to write")
    convert.add_argument(
        "--layout", default="auto", help="of the source: hovle, mmmamba, aki, training, ml-mamba, mmkernels or auto"
    )
    convert.add_argument("--to", default="mmkernels", help="mmkernels, official or training")
    convert.add_argument("--base", type=Path, help="the teacher, or the tower, that training files belong to")
    convert.add_argument(
        "--vision", type=Path, action="append", help="a pretrained tower's folder, once for each (--model ml-mamba)"
    )
    convert.add_argument("--stage", type=int, default=3, help="with --to training: whose tensors are written")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", help="race the ops against what else runs on this machine, and draw it")
    command.add_arguments(bench)
    bench.set_defaults(run=command.bench)
    return parser


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser("prune", help="draw which patches of an image a pruner of visual tokens keeps")
    prune.add_argument("--image", type=Path, required=True, help="any image file")
    prune.add_argument("--show", type=Path, required=True, help="picture to write: kept patches lit, the others dark")
    prune.add_argument(
        "--model",
        type=Path,
        default=Path("out/pruning/model"),
        help="folder of a saved LLaVA or vision tower (CLIP, SigLIP, ViT, DINOv2) with its image processor; "
        "default: what `mmkernels demo --task pruning` saved",
    )
    prune.add_argument("--method", default="vtc_cls", help="name of a pruner, e.g. vtc_cls, divprune, random")
    prune.add_argument("--num-keep", type=int, help="patches to keep; default a quarter")
    prune.add_argument("--keep-ratio", type=float, help="or the share of them")
    prune.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the pruner, e.g. num_layers=7"
    )
    prune.add_argument(
        "--feature-layer", type=int, default=-2, help="of a bare tower: which hidden state is handed on (default -2)"
    )
    prune.set_defaults(run=_prune)


def _info(arguments: argparse.Namespace) -> int:
    import torch

    import mmkernels
    from mmkernels import _native
    from mmkernels._dispatch import BackendUnavailable

    if arguments.build:
        with contextlib.suppress(BackendUnavailable):  # the status printed below says why not
            _native.require()
    print(f"mmkernels {mmkernels.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"CPU threads {torch.get_num_threads()}, CUDA {'yes' if torch.cuda.is_available() else 'no'}")
    print("\nnative library")
    for name, value in _native.status().items():
        print(f"  {name:<12} {value}")
    print("\nbackends")
    print(mmkernels.backends())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    given = {
        "--seeds": arguments.seeds is not None,
        "--steps": arguments.steps is not None,
        "--arms": arguments.arms is not None,
        "--no-controls": arguments.no_controls,
    }
    run, options = _DEMOS[arguments.task]
    foreign = [name for name, used in given.items() if used and name not in options]
    if foreign:
        raise ConfigError(
            f"demo: {foreign[0]} must come with the task it belongs to; got --task {arguments.task}. Leave it out, or "
            "choose another task."
        )
    return run(arguments)


def _demo_ml_mamba(arguments: argparse.Namespace) -> int:
    from mmkernels.demo.ml_mamba import DEMO, run_ml_mamba_demo

    scale, steps = 0.1 if arguments.quick else 1.0, arguments.steps
    stages = {
        name: max(1, round(scale * (getattr(DEMO, name) if steps is None else steps)))
        for name in ("words_steps", "steps", "finetune_steps")
    }
    settings = dataclasses.replace(
        DEMO,
        **stages,
        out=arguments.out or DEMO.out,
        source=arguments.source,
        label_words=arguments.labels,
        seed=arguments.seed,
        questions=500 if arguments.quick else DEMO.questions,
        arms=DEMO.arms if arguments.arms is None else tuple(arguments.arms.split(",")),
    )
    run_ml_mamba_demo(settings)
    return 0


def _demo_mma(arguments: argparse.Namespace) -> int:
    from mmkernels.demo.mma import MMASettings, run_mma_demo

    steps = MMASettings.steps if arguments.steps is None else arguments.steps
    settings = MMASettings(
        out=arguments.out or MMASettings.out,
        source=arguments.source,
        label_words=arguments.labels,
        seed=arguments.seed,
        seeds=MMASettings.seeds if arguments.seeds is None else arguments.seeds,
        steps=max(1, round(0.1 * steps)) if arguments.quick else steps,
        questions=500 if arguments.quick else MMASettings.questions,
        arms=MMASettings.arms if arguments.arms is None else tuple(arguments.arms.split(",")),
    )
    run_mma_demo(settings)
    return 0


def _demo_pruning(arguments: argparse.Namespace) -> int:
    from mmkernels.demo.pruning import PruningSettings, run_pruning_demo

    steps = PruningSettings.steps if arguments.steps is None else arguments.steps
    settings = PruningSettings(
        out=arguments.out or PruningSettings.out,
        source=arguments.source,
        label_words=arguments.labels,
        seed=arguments.seed,
        steps=max(1, round(0.05 * steps)) if arguments.quick else steps,
        questions=50 if arguments.quick else PruningSettings.questions,
        kept=(18, 9) if arguments.quick else PruningSettings.kept,
        random_seeds=1 if arguments.quick else PruningSettings.random_seeds,
    )
    run_pruning_demo(settings)
    return 0


def _demo_linear(arguments: argparse.Namespace) -> int:
    from mmkernels.demo import DemoSettings, run_demo

    scale = 0.1 if arguments.quick else 1.0
    settings = DemoSettings(
        out=arguments.out or DemoSettings.out,
        source=arguments.source,
        label_words=arguments.labels,
        seed=arguments.seed,
        teacher_steps=max(1, round(DemoSettings.teacher_steps * scale)),
        stage_scale=scale,
        questions=500 if arguments.quick else DemoSettings.questions,
        controls=not arguments.no_controls,
    )
    run_demo(settings)
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from mmkernels.interop.prune_show import show
    from mmkernels.pruning import get_pruner

    options: dict[str, Any] = {}
    for text in arguments.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"prune: option must be NAME=VALUE; got {text!r}. For example num_layers=7.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word, such as score_source=column
    given = {"num_keep": arguments.num_keep, "keep_ratio": arguments.keep_ratio}
    budget = {name: value for name, value in given.items() if value is not None}
    if not budget and not {"keep_mass", "r"} & set(options):
        budget = {"keep_ratio": 0.25}
    pruner = get_pruner(arguments.method, **budget, **options)
    kept, patches = show(
        arguments.model, arguments.image, arguments.show, pruner, feature_layer=arguments.feature_layer
    )
    print(f"{pruner!r} keeps {kept} of {patches} patches; wrote {arguments.show}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from mmkernels.demo.answer import answer

    print(answer(arguments.model, arguments.image, arguments.question, max_new_tokens=arguments.max_new_tokens))
    return 0


def _distill(arguments: argparse.Namespace) -> int:
    from mmkernels.demo.distil import distil_saved_teacher

    distil_saved_teacher(
        arguments.config,
        arguments.teacher,
        arguments.out,
        source=arguments.source,
        label_words=arguments.labels,
        resume=arguments.resume,
    )
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    foreign = {"--vision": ("ml-mamba", arguments.vision), "--base": ("mmmamba aki vtc-cls", arguments.base)}
    for name, (owners, value) in foreign.items():
        if value is not None and arguments.model not in owners.split():
            raise ConfigError(f"convert: {name} must come with --model {owners.replace(' ', ' or ')}; got it without.")
    if arguments.model != "mmmamba" and len(arguments.source) != 1:
        raise ConfigError(
            f"convert: {arguments.model} needs one source; got {len(arguments.source)}. Its files hold the whole model."
        )
    _CONVERTERS[arguments.model](arguments)
    print(f"wrote {arguments.destination}")
    return 0


def _convert_mmmamba(arguments: argparse.Namespace) -> None:
    from mmkernels.models.mmmamba.convert_mmmamba import convert_checkpoint

    convert_checkpoint(
        arguments.source,
        arguments.destination,
        layout=arguments.layout,
        to=arguments.to,
        base=arguments.base,
        stage=arguments.stage,
        overwrite=arguments.overwrite,
    )


def _convert_aki(arguments: argparse.Namespace) -> None:
    from mmkernels.models.aki.convert_aki import convert_checkpoint

    convert_checkpoint(
        arguments.source[0],
        arguments.destination,
        layout=arguments.layout,
        to=arguments.to,
        base=arguments.base,
        overwrite=arguments.overwrite,
    )


def _convert_ml_mamba(arguments: argparse.Namespace) -> None:
    from mmkernels.models.ml_mamba.convert_ml_mamba import convert_checkpoint

    convert_checkpoint(
        arguments.source[0],
        arguments.destination,
        layout=arguments.layout,
        to=arguments.to,
        vision=arguments.vision or (),
        overwrite=arguments.overwrite,
    )


def _convert_vtc_cls(arguments: argparse.Namespace) -> None:
    from mmkernels.models.vtc_cls.convert_vtc_cls import convert_checkpoint

    convert_checkpoint(
        arguments.source[0],
        arguments.destination,
        layout=arguments.layout,
        to=arguments.to,
        base=arguments.base,
        overwrite=arguments.overwrite,
    )


_DEMOS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[str, ...]]] = {
    "linear": (_demo_linear, ("--no-controls",)),
    "mma": (_demo_mma, ("--seeds", "--steps", "--arms")),
    "ml-mamba": (_demo_ml_mamba, ("--steps", "--arms")),
    "pruning": (_demo_pruning, ("--steps",)),
}
_CONVERTERS = {
    "mmmamba": _convert_mmmamba,
    "aki": _convert_aki,
    "ml-mamba": _convert_ml_mamba,
    "vtc-cls": _convert_vtc_cls,
}


if __name__ == "__main__":
    sys.exit(main())
