"""Where families of models take their images in: tower, placeholder, and what stands for an image that is pruned."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkernels.errors import BackendError, ConfigError
from mmkernels.interop.prune_layout import ImageTokens
from mmkernels.interop.prune_merging import run_merging
from mmkernels.interop.prune_tower import Seen, Tower, resampler, vit
from mmkernels.pruning.pruner import Encoder, Pruned, TokenPruner, VisionInputs
from mmkernels.pruning.tome import ToMe


@dataclass(frozen=True)
class Choice:
    """What `prune` was asked for.

    Attributes:
        pruner: at the vision side; None: images pass whole.
        skip_padding: keep patches that the model cuts away anyway out of the choice.
    """

    pruner: TokenPruner | None
    skip_padding: bool = True


class Llava:
    """LLaVA-1.5 and its like: one feature layer (or several, side by side), projected patch by patch."""

    names: ClassVar[tuple[str, ...]] = ("LlavaModel",)
    plain_decoder: ClassVar[bool] = True  # causal over the whole prompt: layers may see fewer tokens
    merges: ClassVar[bool] = True  # the tower's tokens are the image's tokens, so blocks may merge them
    placeholders: ClassVar[bool] = True  # a prompt has one for each token of an image
    position_start: ClassVar[int] = 0

    def __init__(self, model: Any, core: Any):
        self.model, self.core, self.config = model, core, core.config

    @cached_property
    def tower(self) -> Tower:
        """What is scored and pruned; looked for when images come, not for every token of an answer."""
        return vit(self.core.vision_tower)

    @property
    def image_token_id(self) -> int:
        """The placeholder."""
        return int(self.config.image_token_id)

    @property
    def decoder(self) -> Any:
        """The module with the decoder's layers."""
        return self.core.language_model

    def grid(self) -> tuple[int, int]:
        """Patches of an image."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    def layers(self, chosen: Any = None) -> tuple[int, ...]:
        """Encoder layers whose outputs are handed on."""
        chosen = self.config.vision_feature_layer if chosen is None else chosen
        count = len(self.tower.layers)
        layers = tuple((i if i >= 0 else count + 1 + i) - 1 for i in ([chosen] if isinstance(chosen, int) else chosen))
        if not all(0 <= layer < count for layer in layers):
            raise ConfigError(
                f"prune: vision_feature_layer must name outputs of the {count} encoder layers, 1 .. {count} or "
                f"-{count} .. -1; got {chosen}. The embeddings below the first layer cannot be pruned."
            )
        return layers

    def encoder(self) -> Encoder:
        """The facts a pruner decides by."""
        return self.tower.encoder(max(self.layers()), self.grid())

    def take(self, given: dict[str, Any], choice: Choice) -> list[ImageTokens] | None:
        """The images of a call, pruned; their arguments are taken out of `given`."""
        layers, strategy = given.pop("vision_feature_layer", None), given.pop("vision_feature_select_strategy", None)
        sizes, pixels = given.pop("image_sizes", None), given.pop("pixel_values", None)
        if pixels is None or pixels.shape[0] == 0:
            return None
        return self._take(
            pixels, sizes, self.layers(layers), strategy or self.config.vision_feature_select_strategy, choice
        )

    def _take(
        self, pixels: Tensor, sizes: Any, layers: tuple[int, ...], strategy: str, choice: Choice
    ) -> list[ImageTokens]:
        if sizes is not None:
            raise ConfigError(
                "prune: image_sizes must be left out; got some. Models whose images have sizes of their own (Pixtral) "
                "cannot be pruned."
            )
        lead = self._lead(strategy)
        height, width = self._grid_of(pixels)
        pruned = self._encode(pixels, layers, lead, choice)
        return [
            image_tokens(pruned.tokens[i], pruned.indices[i], pruned.mask[i], lead + height * width, lead)
            for i in range(pruned.tokens.shape[0])
        ]

    def _grid_of(self, pixels: Tensor) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def _lead(self, strategy: str) -> int:
        """How many prefix tokens are handed on in front of the patches."""
        if strategy == "full":
            return self.tower.num_prefix
        if self.tower.num_prefix != 1:
            raise ConfigError(
                f"prune: vision_feature_select_strategy must be 'full' for a tower with {self.tower.num_prefix} prefix "
                f"tokens; got {strategy!r}, which cuts off the first token, here a patch. Set it in the configuration."
            )
        return 0

    def _encode(
        self, pixels: Tensor, layers: tuple[int, ...], lead: int, choice: Choice, end: bool = False, **facts: Any
    ) -> Pruned:
        """Encode, prune and project; with `end`, from the tower's own last hidden state."""
        grid = self._grid_of(pixels)
        encoder = self.tower.encoder(max(layers), grid)
        if isinstance(choice.pruner, ToMe):
            if len(layers) > 1 or facts.get("mask") is not None:
                raise ConfigError(
                    f"prune: {choice.pruner.name} must have one feature layer and whole tiles; got layers {layers}"
                    f"{' and padding' if facts.get('mask') is not None else ''}. Set skip_padding=False."
                )
            handed, pruned = run_merging(self.tower, pixels, choice.pruner, encoder, end=end)
            tokens = torch.cat([handed[:, :lead], pruned.tokens], dim=1) if lead else pruned.tokens
            return Pruned(self.project(tokens), pruned.indices, pruned.mask, pruned.sizes)
        taps = () if choice.pruner is None else choice.pruner.taps(encoder)
        seen = self.tower.run(pixels, num_tokens=grid[0] * grid[1], layers=layers, taps=taps, to_the_end=end)
        hidden = torch.cat([seen.hidden[layer] for layer in layers], dim=-1) if len(layers) > 1 else None
        hidden = seen.last if end else seen.hidden[layers[0]] if hidden is None else hidden
        assert hidden is not None
        first = self.tower.num_prefix
        return self._prune(hidden[:, first:], hidden[:, :first], lead, seen, choice, grid=grid, **facts)

    def _prune(self, features: Tensor, prefix: Tensor, lead: int, seen: Seen, choice: Choice, **facts: Any) -> Pruned:
        """Prune and project, on the pruner's side of the projector; the prefix tokens handed on come first."""
        late = choice.pruner is not None and choice.pruner.stage == "post_projector"
        handed = prefix[:, :lead]
        if choice.pruner is None or late:
            projected = self.project(torch.cat([handed, features], dim=1) if lead else features)
            handed, features, prefix = projected[:, :lead], projected[:, lead:], projected[:, :lead]
        pruned = everything(features)
        if choice.pruner is not None:
            pruned = choice.pruner(VisionInputs(features, prefix=prefix, taps=seen.taps, **facts))
        tokens = torch.cat([handed, pruned.tokens], dim=1) if lead else pruned.tokens
        if choice.pruner is not None and not late:
            tokens = self.project(tokens)
        return Pruned(tokens, pruned.indices, pruned.mask, pruned.sizes)

    def project(self, features: Tensor) -> Tensor:
        """Features of the tower to the decoder's width."""
        return self.core.multi_modal_projector(features)

    def hand_over(self, given: dict[str, Any], images: list[ImageTokens]) -> None:
        """Put the tokens of all images among the arguments of the model's own forward."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens: Any = [image.tokens for image in images]
        given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}


class LlavaNext(Llava):
    """LLaVA-NeXT: a base crop, then tiles stitched to one picture, cut to the image and closed row by row."""

    names = ("LlavaNextModel",)

    def _take(
        self, pixels: Tensor, sizes: Any, layers: tuple[int, ...], strategy: str, choice: Choice
    ) -> list[ImageTokens]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        if self._lead(strategy):
            raise ConfigError(
                "prune: vision_feature_select_strategy must be 'default' for a tower with [CLS]; got 'full'. Tiles "
                "with a [CLS] each cannot be stitched."
            )
        edge, points = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        crops = [image_size_to_num_patches(size, points, edge) for size in sizes]
        if pixels.dim() == 5:
            pixels = torch.cat([image[:count] for image, count in zip(pixels, crops, strict=True)])
        height, width = self._grid_of(pixels)
        orders = self._orders(crops, height * width, sizes, strategy, pixels.device)
        mask = _visible(orders, crops, height * width) if choice.skip_padding else None
        pruned = self._encode(pixels, layers, 0, choice, mask=mask, crops=tuple(crops))
        first, images = 0, []
        for order, count in zip(orders, crops, strict=True):
            images.append(self._stitch(pruned, slice(first, first + count), order, height * width))
            first += count
        return images

    def _orders(self, crops: list[int], tokens: int, sizes: Any, strategy: str, device: torch.device) -> list[Tensor]:
        """Which patch stands where in a stitched and cut image, -1 for newlines: the model's own rule, on numbers."""
        numbers = []
        for count in crops:
            places = torch.arange(count * tokens, dtype=torch.float64, device=device)
            numbers.append(places.view(count, tokens, 1))
        newline = torch.full((1,), -1.0, dtype=torch.float64, device=device)
        packed, _ = self.core.pack_image_features(
            numbers, sizes, vision_feature_select_strategy=strategy, image_newline=newline
        )
        return [order[:, 0].long() for order in packed]

    def _stitch(self, pruned: Pruned, crops: slice, order: Tensor, tokens: int) -> ImageTokens:
        """The tokens of one image: those whose patch is still there, and every newline."""
        indices, mask = pruned.indices[crops], pruned.mask[crops]
        rows = pruned.tokens[crops][mask]
        crop = torch.arange(indices.shape[0], device=indices.device)[:, None].expand_as(indices)
        patch = torch.where(indices >= 0, crop * tokens + indices, -1)[mask]
        row_of = torch.full((indices.shape[0] * tokens,), -1, dtype=torch.int64, device=indices.device)
        row_of[patch[patch >= 0]] = (patch >= 0).nonzero()[:, 0]
        row = torch.where(order >= 0, row_of[order.clamp(min=0)], -1)
        places = ((order < 0) | (row >= 0)).nonzero()[:, 0]
        kept = row[places]
        newline = self.core.image_newline.to(rows.device, rows.dtype)
        own = torch.where((kept >= 0)[:, None], rows[kept.clamp(min=0)], newline)
        extra = rows[patch < 0]  # tokens of no single patch stand behind the image
        ends = places.new_full((extra.shape[0],), order.shape[0] - 1)
        patches = torch.cat([order[places], torch.full_like(ends, -1)])
        return ImageTokens(torch.cat([own, extra]), torch.cat([places, ends]), order.shape[0], patches)


class PaliGemma(Llava):
    """PaliGemma: the tower's normed last hidden state, projected; the prompt reads itself in both directions."""

    names = ("PaliGemmaModel",)
    plain_decoder = False
    position_start = 1

    def layers(self, chosen: Any = None) -> tuple[int, ...]:
        """The last one."""
        return (len(self.tower.layers) - 1,)

    def take(self, given: dict[str, Any], choice: Choice) -> list[ImageTokens] | None:
        """The images of a call, pruned; their arguments are taken out of `given`."""
        pixels = given.pop("pixel_values", None)
        if pixels is None or pixels.shape[0] == 0:
            return None
        height, width = self._grid_of(pixels)
        pruned = self._encode(pixels, self.layers(), 0, choice, end=True)
        return [
            image_tokens(pruned.tokens[i], pruned.indices[i], pruned.mask[i], height * width, 0)
            for i in range(pruned.tokens.shape[0])
        ]

    def hand_over(self, given: dict[str, Any], images: list[ImageTokens]) -> None:
        """Put the tokens of all images among the arguments of the model's own forward."""
        super().hand_over(given, images)
        output = given["mm_encoder_outputs"]["image"]
        output.pooler_output = torch.cat(output.pooler_output)[None]


class Aki(Llava):
    """AKI: the resampler's latents are the image's tokens, so they are what is pruned; they come in no raster."""

    names = ("AkiForConditionalGeneration",)
    plain_decoder = False
    merges = False

    @cached_property
    def tower(self) -> Tower:
        """The resampler; how many features it reads is known when they are there."""
        return resampler(self.core.resampler, 0)

    def grid(self) -> tuple[int, int]:
        """All latents in a row."""
        return 1, self.config.num_vision_tokens

    def layers(self, chosen: Any = None) -> tuple[int, ...]:
        """The last layer of the resampler."""
        return (len(self.tower.layers) - 1,)

    def take(self, given: dict[str, Any], choice: Choice) -> list[ImageTokens] | None:
        """The images of a call, pruned; their arguments are taken out of `given`."""
        pixels = given.get("pixel_values")
        if pixels is None or pixels.shape[0] == 0:
            return None
        given["pixel_values"] = None
        features = self.core.encode_images(pixels)
        tower = resampler(self.core.resampler, features.shape[1])
        taps = () if choice.pruner is None else choice.pruner.taps(self.encoder())
        count = self.config.num_vision_tokens
        seen = tower.run(features, num_tokens=count, layers=self.layers(), taps=taps)
        latents = self.core.resampler.norm(seen.hidden[self.layers()[0]])
        pruned = self._prune(latents, latents[:, :0], 0, seen, choice, grid=self.grid())
        return [
            image_tokens(pruned.tokens[i], pruned.indices[i], pruned.mask[i], count, 0)
            for i in range(pruned.tokens.shape[0])
        ]

    def project(self, features: Tensor) -> Tensor:
        """Latents to the decoder's width."""
        return self.core.resampler.projection(features)

    def hand_over(self, given: dict[str, Any], images: list[ImageTokens]) -> None:
        """Put the tokens of all images among the arguments of the model's own forward."""
        given |= {"pixel_values": None, "image_tokens": torch.cat([image.tokens for image in images])}


class MLMamba(Llava):
    """ML-Mamba: pruned behind the connector's scan, which needs the grid; prompts have no placeholder."""

    names = ("MLMambaForConditionalGeneration",)
    plain_decoder = False
    merges = False
    placeholders = False

    @cached_property
    def tower(self) -> Tower:
        """The first tower with [CLS], to score by; what is called is all of them."""
        towers = [vit(tower) for tower in self.core.vision_tower.towers]
        first = next((tower for tower in towers if tower.num_prefix), towers[0])
        return replace(first, module=self.core.vision_tower)

    def grid(self) -> tuple[int, int]:
        """Patches of an image."""
        height, width = self.config.grid
        return height, width

    def layers(self, chosen: Any = None) -> tuple[int, ...]:
        """The last but one, as the towers hand it on."""
        return (len(self.tower.layers) - 2,)

    def features(self, pixels: Tensor, choice: Choice) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings that stay, (images, tokens, hidden), and their patches."""
        height, width = self.grid()
        taps = () if choice.pruner is None else choice.pruner.taps(self.encoder())
        seen = self.tower.run(pixels, num_tokens=height * width, layers=(), taps=taps, to_the_end=True)
        features, _ = seen.last  # type: ignore[misc]
        hidden = self.core.connector.mix(features.to(self.core.connector.entry.weight.dtype), (height, width))
        pruned = self._prune(hidden, hidden[:, :0], 0, seen, choice, grid=(height, width))
        if not bool(pruned.mask.all()):
            raise ConfigError(
                f"prune: {choice.pruner!r} must keep as many tokens of every image; got different numbers. ML-Mamba "
                "reads images of one length: use num_keep or keep_ratio."
            )
        return pruned.tokens, list(pruned.indices.detach())

    def project(self, features: Tensor) -> Tensor:
        """The connector's width to the language model's."""
        return self.core.connector.projector(features)


_FAMILIES: tuple[type[Llava], ...] = (Llava, LlavaNext, PaliGemma, Aki, MLMamba)


def seam_of(model: Any) -> Llava:
    """The seam of a model, or of one with a language head around it.

    Raises:
        BackendError: a model whose placeholders cannot be shrunk.
    """
    for core in (model, getattr(model, "model", None)):
        names = {kind.__name__ for kind in type(core).__mro__}
        for family in _FAMILIES:
            if names & set(family.names):
                return family(model, core)
    raise BackendError(
        f"prune: model must be of a family whose image placeholders can be shrunk; got {type(model).__name__}. Known: "
        "LLaVA (any ViT tower), LLaVA-NeXT, PaliGemma, AKI, ML-Mamba. Models that merge patches or count positions in "
        "three dimensions (Qwen2-VL) are not among them."
    )


def _visible(orders: list[Tensor], crops: list[int], tokens: int) -> Tensor | None:
    """(crops, tokens) bool, False for patches that are cut away; None when none is."""
    rows = []
    for order, count in zip(orders, crops, strict=True):
        row = torch.zeros(count * tokens, dtype=torch.bool, device=order.device)
        row[order[order >= 0]] = True
        rows.append(row.view(count, tokens))
    mask = torch.cat(rows)
    return None if bool(mask.all()) else mask


def everything(features: Tensor) -> Pruned:
    """Nothing pruned."""
    images, tokens = features.shape[:2]
    indices = torch.arange(tokens, device=features.device).expand(images, -1)
    return Pruned(features, indices, torch.ones_like(indices, dtype=torch.bool))


def image_tokens(tokens: Tensor, indices: Tensor, mask: Tensor, full: int, lead: int) -> ImageTokens:
    """One image of a Pruned, whose `lead` first tokens are prefix tokens handed on whole."""
    patches = torch.cat([indices.new_full((lead,), -1), indices[mask]])
    rows = torch.cat([tokens[:lead], tokens[lead:][mask]])
    own = torch.cat([torch.arange(lead, device=patches.device), torch.where(patches < 0, -1, patches + lead)[lead:]])
    # a token without a patch of its own stands where the one before it does
    places = torch.arange(own.shape[0], device=own.device)
    before = torch.where(own >= 0, places, -1).cummax(0).values
    return ImageTokens(rows, torch.where(before >= 0, own[before.clamp(min=0)], 0), full, patches)
