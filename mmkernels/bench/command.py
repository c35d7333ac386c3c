"""What `mmkernels bench` does: choose the plan, run it, print and write the report, draw the pictures."""

import argparse
import shlex
import sys
import time
from pathlib import Path

from mmkernels.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand; needs neither torch's ops nor any peer."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="every op once at one small layer: under 90 seconds")
    size.add_argument("--full", action="store_true", help="every shape, length, dtype and peer: most of an hour")
    parser.add_argument("--ops", type=names, help="parts, e.g. ssd_scan,mixer,memory,first_call; default: all")
    parser.add_argument(
        "--shapes", type=names, help="layers: 130m,1.3b,2.7b,mmmamba; prompts: aki,bidir,kv-cache; images: clip-l"
    )
    parser.add_argument("--lengths", type=numbers, help="tokens, e.g. 512,2048")
    parser.add_argument("--dtypes", type=names, help="float32,bfloat16")
    parser.add_argument("--passes", type=names, help="forward, or backward (both passes together); default: each")
    parser.add_argument(
        "--threads", type=numbers, help="e.g. 1,2; default: as the plan has it, from torch's own number"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results.json, report and plots")
    parser.add_argument(
        "--again", action="store_true", help="measure anew what is asked for and the folder has already"
    )


def names(text: str) -> list[str]:
    """A comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    return [int(word) for word in names(text)]


def bench(arguments: argparse.Namespace) -> int:
    """Run the subcommand; 0 when the report is written."""
    import torch

    from mmkernels.bench import plans, plot, run, tables

    if arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"bench: --out must name a folder; got the file {arguments.out}. Name another.")
    threads = max(arguments.threads or [torch.get_num_threads()])
    make = plans.quick if arguments.quick else plans.full if arguments.full else plans.usual
    plan = plans.asked(
        make(threads),
        parts=arguments.ops,
        shapes=arguments.shapes,
        lengths=arguments.lengths,
        dtypes=arguments.dtypes,
        threads=arguments.threads,
        passes=arguments.passes,
    )
    results = run.Results(arguments.out, again=arguments.again)
    built = run.build_first()
    if built > 5:
        print(f"native library compiled in {built:.0f} s", file=sys.stderr)
    before, started = torch.get_num_threads(), time.perf_counter()
    try:
        run.carry_out(plan, results)
    finally:
        torch.set_num_threads(before)
    results.note(_command(arguments))
    said = tables.report(results.content)
    (arguments.out / "report.md").write_text(said, encoding="utf-8")
    print(said)
    for path in [arguments.out / "report.md", results.path, *plot.draw(results.content, arguments.out)]:
        print(f"wrote {path}")
    print(f"in {time.perf_counter() - started:.0f} s")
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """The command line that made the report, without what does not change it."""
    words = ["mmkernels", "bench"]
    words += [f"--{flag}" for flag in ("quick", "full") if getattr(arguments, flag)]
    for option in ("ops", "shapes", "lengths", "dtypes", "threads", "passes"):
        values = getattr(arguments, option)
        words += [f"--{option}", ",".join(map(str, values))] if values else []
    return shlex.join(words)
