"""VTCCLSForConditionalGeneration: LLaVA-1.5 whose decoder reads the visual tokens that [CLS] attends to.

Source: VTC-CLS (arXiv 2412.05819).
"""

from typing import Any

from transformers import LlavaForConditionalGeneration

from mmkernels.interop.prune import check_pruner
from mmkernels.interop.prune_model import Pruning, pruned_class
from mmkernels.interop.prune_seams import Choice
from mmkernels.models.vtc_cls.configuration_vtc_cls import VTCCLSConfig
from mmkernels.pruning.registry import get_pruner


class VTCCLSForConditionalGeneration(pruned_class(LlavaForConditionalGeneration)):  # type: ignore[misc]
    """LLaVA-1.5 with VTC-CLS built in: `config.num_keep` of each image's tokens reach the projector and the decoder.

    Everything else is `LlavaForConditionalGeneration`: its processor, prompts with all placeholders, `generate`.
    `mmkernels.prune` puts another pruner of the vision side in this one's place for a while, or one of the decoder
    beside it.

    Raises:
        ConfigError: scoring layers that the tower has not, or a tower without [CLS] and no `score_source`.

    Example:
        >>> model = VTCCLSForConditionalGeneration.from_pretrained(folder)  # doctest: +SKIP
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))  # doctest: +SKIP
    """

    config_class = VTCCLSConfig

    def __init__(self, config: VTCCLSConfig):
        super().__init__(config)
        self.keep_tokens(config.num_keep)

    def keep_tokens(self, num_keep: int | None) -> None:
        """Change how many visual tokens of an image are read; None: all.  Written into the configuration.

        Raises:
            ShapeError: more than an image has.
        """
        pruning = None
        if num_keep is not None:
            config: Any = self.config
            pruner = get_pruner(
                "vtc_cls", num_keep=num_keep, num_layers=config.num_layers, score_source=config.score_source
            )
            check_pruner(self, pruner)
            pruning = Pruning(Choice(pruner), compact=config.position_policy == "compact")
        self.config.num_keep = num_keep
        self._pruning = pruning
