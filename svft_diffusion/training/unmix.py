"""The unmix loss: the word of each subject must not look at the half of a mixed sample that shows the other.

SVDiff (Han et al. 2023), section 3.3: "we use MSE on the non-corresponding regions of the cross-attention maps", the
maps of the subjects' special tokens. The paper's main text names neither layers nor weight. As in other work on
cross-attention maps (Hertz et al. 2022, arXiv 2208.01626, section 3; Chefer et al. 2023, arXiv 2301.13826), they are
those at a quarter of the latents' side (16 x 16 with SD 1.5), the mean of all layers and heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTokenizer

from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily
from svft_diffusion.models.text import text_readers
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.mixing import Mixing

_SHARE_OF_SIDE = 4  # latents' side over that of the maps


class SubjectTokens(NamedTuple):
    """Places in a prompt of the rare tokens of its two subjects."""

    left: list[int]
    right: list[int]


class Projections:
    """Queries and keys of some attention layers in one forward pass, by the layers' names."""

    def __init__(self) -> None:
        self.queries: dict[str, Tensor] = {}  # (B, places, heads * width)
        self.keys: dict[str, Tensor] = {}  # (B, tokens, heads * width)

    def keep(
        self, kept: dict[str, Tensor], name: str, _module: nn.Module, _arguments: tuple[Any, ...], output: Tensor
    ) -> None:
        """Forward hook of a projection; passes that nothing is learned from, as the base model's, don't count."""
        if torch.is_grad_enabled():
            kept[name] = output


class Unmix:
    """The unmix loss of a run.

    Queries and keys are read by hooks on their projections, and the maps made of them beside the model: whatever
    computes the attention itself (torch's fused kernels, xformers) stays as it is. Hooks are there during the forward
    pass alone; when gradient checkpointing computes it again, nothing is read twice.

    Args:
        tokens: of each prompt of mixed photos, where its subjects' rare tokens are.
    """

    def __init__(self, unet: UNet2DConditionModel, tokens: Mapping[str, SubjectTokens]) -> None:
        self._tokens = tokens
        self._factor, self._layers = map_layers(unet)

    @contextmanager
    def reading(self) -> Iterator[Projections]:
        """While entered, the projections of the forward pass are kept."""
        projections = Projections()
        hooks = []
        for name, layer in self._layers.items():
            for module, kept in ((layer.to_q, projections.queries), (layer.to_k, projections.keys)):
                hooks.append(module.register_forward_hook(partial(projections.keep, kept, name)))
        try:
            yield projections
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, projections: Projections, batch: Batch) -> Tensor:
        """Mean over the photos of a batch; those that are not mixed count as zero.

        So every sample counts the same, whatever batch it is in, as in the denoising loss.
        """
        photos = [row for row, (kind, _) in enumerate(batch.samples) if kind == "instance"]
        mixed = [(row, self._tokens[batch.prompts[row]]) for row in photos if batch.prompts[row] in self._tokens]
        if not mixed:
            return batch.latents.mean.new_zeros(())
        height, width = (_reduced(side, self._factor) for side in batch.latents.mean.shape[-2:])
        rows = torch.tensor([row for row, _ in mixed], device=batch.latents.mean.device)
        maps = self._maps(projections, rows).unflatten(-1, (height, width))
        losses = [unmix_loss(maps[number], tokens) for number, (_, tokens) in enumerate(mixed)]
        return torch.stack(losses).sum() / len(photos)

    def _maps(self, projections: Projections, rows: Tensor) -> Tensor:
        """(rows, tokens, places), the mean of all layers."""
        total: Tensor | None = None
        for name, layer in self._layers.items():
            query, key = projections.queries[name][rows], projections.keys[name][rows]
            # Computed again in the backward pass: maps of all heads are larger than queries and keys.
            of_layer = checkpoint(attention_map, query, key, layer.heads, layer.scale, use_reentrant=False)
            total = of_layer if total is None else total + of_layer
        assert total is not None  # `map_layers`
        return total / len(self._layers)


def unmix_loss(maps: Tensor, tokens: SubjectTokens) -> Tensor:
    """Squared attention in the other's half, its mean over the places there and the subject's tokens; both added.

    Of the subjects i on the left and on the right with tokens T_i and the other's half R_i:
    sum_i mean_{t in T_i} mean_{p in R_i} A_t(p)^2. A column of the map that the cut goes through counts by its share.

    Args:
        maps: (tokens, h, w), of one mixed sample.
    """
    height, width = maps.shape[-2:]
    columns = torch.arange(width, device=maps.device, dtype=maps.dtype)
    on_the_left = (width / 2 - columns).clamp(0, 1)
    losses = []
    for own, elsewhere in ((tokens.left, 1 - on_the_left), (tokens.right, on_the_left)):
        squared = maps[own].square().mean(dim=0)
        losses.append((squared * elsewhere).sum() / (height * elsewhere.sum()))
    return losses[0] + losses[1]


def attention_map(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """How much each place looks at each token, the mean of all heads: (B, tokens, places) in float32.

    Args:
        query: (B, places, heads * width).
        key: (B, tokens, heads * width).
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
        attention = (query @ key.transpose(-1, -2) * scale).softmax(dim=-1)
        return attention.mean(dim=1).transpose(-1, -2)


def map_layers(unet: UNet2DConditionModel) -> tuple[int, dict[str, Attention]]:
    """(latents' side over the maps' side, the layers): the cross-attention nearest to a quarter of the latents' side.

    Raises:
        UserError: there is none.
    """
    last = len(unet.config.block_out_channels) - 1
    levels = {"mid_block": last}
    levels |= {f"down_blocks.{level}": level for level in range(last + 1)}
    levels |= {f"up_blocks.{number}": last - number for number in range(last + 1)}
    by_factor: dict[int, dict[str, Attention]] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith(".attn2") and module.is_cross_attention:
            factor = 2 ** levels[".".join(name.split(".")[: 1 if name.startswith("mid") else 2])]
            by_factor.setdefault(factor, {})[name] = module
    if not by_factor:
        raise UserError("this base's U-Net has no cross-attention for the unmix loss; use --unmix_loss_weight 0")
    nearest = min(by_factor, key=lambda factor: (abs(math.log2(factor / _SHARE_OF_SIDE)), factor))
    return nearest, by_factor[nearest]


def check_unmix(family: ModelFamily) -> None:
    """Raise `UserError` if the base model has no cross-attention to read maps from."""
    unet = getattr(family.pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(
            "the unmix loss reads the cross-attention of a U-Net, which this base does not have; use "
            "--unmix_loss_weight 0 to train on mixed pictures without it"
        )
    map_layers(unet)


def make_unmix(family: ModelFamily, mixing: Mixing) -> Unmix:
    """The unmix loss of a run on a base that `check_unmix` found good."""
    tokenizers = [reader.tokenizer for reader in text_readers(family.pipeline).values()]
    places = {}
    for spans in mixing.spans():
        of_all = [
            SubjectTokens(*(token_places(tokenizer, spans.prompt, *span) for span in (spans.left, spans.right)))
            for tokenizer in tokenizers
        ]
        if any(tokens != of_all[0] for tokens in of_all):
            raise UserError("the text encoders of this base split words differently; use --unmix_loss_weight 0")
        places[spans.prompt] = of_all[0]
    return Unmix(family.pipeline.unet, places)


def token_places(tokenizer: CLIPTokenizer, prompt: str, start: int, words: str) -> list[int]:
    """Which tokens of an encoded prompt are ``words``, which begin at character ``start`` of it.

    Raises:
        UserError: they are not tokens of their own.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    before, own = tokens(prompt[:start]), tokens(words)
    first = len(before)
    if tokens(prompt)[: first + len(own)] != before + own:
        raise UserError(
            f"--cut_mix_prompt: in {prompt!r} the tokenizer does not see {words!r} as words of their own; put spaces "
            "around {left} and {right}"
        )
    begin = int(tokenizer(prompt).input_ids[0] == tokenizer.bos_token_id)
    return list(range(begin + first, begin + first + len(own)))


def _reduced(side: int, factor: int) -> int:
    """A side after halvings, each of which rounds up, as convolutions of stride 2 do."""
    while factor > 1:
        side, factor = (side + 1) // 2, factor // 2
    return side
