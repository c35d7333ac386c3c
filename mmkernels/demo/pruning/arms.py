"""The pruners that are compared, all made by `mmkernels.get_pruner`."""

from dataclasses import dataclass, field
from typing import Any

from mmkernels.pruning import TokenPruner, get_pruner


@dataclass(frozen=True)
class Arm:
    """One pruner.

    Args:
        key: name in results.json.
        label: name in tables and pictures.
        name: of the pruner.
        colour: in the pictures.
        options: of the pruner, besides its budget.
        seeded: whether it draws, so that it is measured several times.
        least: the smallest budget it can be given on this model.
    """

    key: str
    label: str
    name: str
    colour: str
    options: dict[str, Any] = field(default_factory=dict)
    seeded: bool = False
    least: int = 1

    def pruner(self, kept: int, seed: int = 0) -> TokenPruner:
        """It, with a budget."""
        drawn = {"seed": seed, "per_image": True} if self.seeded else {}
        return get_pruner(self.name, num_keep=kept, **self.options, **drawn)


ARMS = (
    Arm("vtc_cls", "VTC-CLS, K = 3", "vtc_cls", "#1b9e77"),
    Arm("fastervlm", "VTC-CLS, K = 1 (FasterVLM)", "fastervlm", "#66c2a5"),
    Arm("fastv", "FastV, K = 2", "fastv", "#8f6fb0", {"layer": 2}),
    Arm("divprune", "DivPrune", "divprune", "#2b6cb0"),
    # three layers, and each merges half of what is there at most, evenly over the layers
    Arm("tome", "ToMe, in the encoder", "tome", "#b8860b", least=9),
    Arm("tome_after", "ToMe, behind the encoder", "tome_after", "#d6a84b"),
    Arm("uniform", "uniform grid", "uniform", "#7a828e"),
    Arm("random", "random", "random", "#c0c5ce", seeded=True),
    Arm("least_cls", "least [CLS] attention", "least_cls", "#c0392b"),
)
