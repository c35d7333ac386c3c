"""ML-Mamba's connectors on canvases where position matters: MLP, Basic, Advanced; two ways, four ways, one way to scan.

    python benchmarks/models/ml_mamba_connectors.py                digits, three seeds: about ten minutes of CPU time
    python benchmarks/models/ml_mamba_connectors.py --seeds 5 --steps 800 --arms mlp,advanced

Writes NAME.md and NAME.png into --results after every run; what is in between goes to --out.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from mmkernels.demo.ml_mamba import MLMambaSettings, compare_connectors
from mmkernels.demo.ml_mamba.report import comparison_report

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help='"digits" or a folder with MNIST-format idx files')
    parser.add_argument("--labels", default="digits", help='names of the labels: "digits" or "fashion"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=MLMambaSettings.steps)
    parser.add_argument("--grid", type=int, default=MLMambaSettings.grid, help="cells along a side")
    parser.add_argument("--arms", help="comma-separated: which connectors")
    parser.add_argument("--workers", type=int, help="processes of one thread; default as many as torch has threads")
    parser.add_argument("--name", default="ml_mamba_connectors")
    parser.add_argument("--out", type=Path, default=Path("out/ml_mamba_connectors"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    settings = MLMambaSettings(
        out=arguments.out,
        source=arguments.data,
        label_words=arguments.labels,
        seeds=arguments.seeds,
        steps=arguments.steps,
        grid=arguments.grid,
        arms=MLMambaSettings.arms if arguments.arms is None else tuple(arguments.arms.split(",")),
        workers=arguments.workers,
    )

    def write(results: dict[str, Any]) -> None:
        shutil.copyfile(arguments.out / "curves.png", arguments.results / f"{arguments.name}.png")
        text = comparison_report(results, f"{arguments.name}.png")
        (arguments.results / f"{arguments.name}.md").write_text(text)

    compare_connectors(settings, write)


if __name__ == "__main__":
    main()
