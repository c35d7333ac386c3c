"""Which visual tokens to keep: accuracy of a small trained LLaVA against the tokens left, for every pruner.

    python benchmarks/models/pruning_tokens.py                       digits: about two minutes on two quiet cores
    python benchmarks/models/pruning_tokens.py --data FOLDER --labels fashion --name pruning_tokens_fashion

Writes NAME.md, NAME.png and NAME_lit.png into --results; what is in between goes to --out.
"""

import argparse
import shutil
import sys
from pathlib import Path

from mmkernels.demo.pruning import PruningSettings, run_pruning_demo
from mmkernels.demo.pruning.report import markdown

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help='"digits" or a folder with MNIST-format idx files')
    parser.add_argument("--labels", default="digits", help='names of the labels: "digits" or "fashion"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=PruningSettings.steps)
    parser.add_argument("--name", default="pruning_tokens")
    parser.add_argument("--out", type=Path, default=Path("out/pruning_tokens"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    settings = PruningSettings(
        out=arguments.out,
        source=arguments.data,
        label_words=arguments.labels,
        seed=arguments.seed,
        steps=arguments.steps,
    )
    results = run_pruning_demo(settings)
    results["command"] = " ".join(["python benchmarks/models/pruning_tokens.py", *sys.argv[1:]])
    for source, suffix in (("curves.png", ".png"), ("lit.png", "_lit.png")):
        shutil.copyfile(arguments.out / source, arguments.results / f"{arguments.name}{suffix}")
    text = markdown(results, f"{arguments.name}.png", f"{arguments.name}_lit.png")
    (arguments.results / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
