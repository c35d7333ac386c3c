"""How fast six ways of attending learn questions asked after an image: table and learning curves over several seeds.

    python benchmarks/models/mma_learning.py                       digits, three seeds: a few minutes on two cores
    python benchmarks/models/mma_learning.py --data FOLDER --labels fashion --name mma_learning_fashion

Writes NAME.md, NAME.png and NAME_masks.png into --results; what is in between goes to --out.
"""

import argparse
import shutil
import sys
from pathlib import Path

from mmkernels.demo.mma import MMASettings, run_mma_demo
from mmkernels.demo.mma.report import markdown

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help='"digits" or a folder with MNIST-format idx files')
    parser.add_argument("--labels", default="digits", help='names of the labels: "digits" or "fashion"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=MMASettings.steps)
    parser.add_argument("--workers", type=int, help="processes of one thread; default as many as torch has threads")
    parser.add_argument("--name", default="mma_learning")
    parser.add_argument("--out", type=Path, default=Path("out/mma_learning"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    settings = MMASettings(
        out=arguments.out,
        source=arguments.data,
        label_words=arguments.labels,
        seeds=arguments.seeds,
        steps=arguments.steps,
        workers=arguments.workers,
    )
    results = run_mma_demo(settings)
    results["command"] = " ".join(["python benchmarks/models/mma_learning.py", *sys.argv[1:]])
    for source, suffix in (("curves.png", ".png"), ("masks.png", "_masks.png")):
        shutil.copyfile(arguments.out / source, arguments.results / f"{arguments.name}{suffix}")
    text = markdown(results, f"{arguments.name}.png", f"{arguments.name}_masks.png")
    (arguments.results / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
