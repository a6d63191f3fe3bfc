"""Presets that name the layers of a model by what they do.

A layer is recognised by its module path, since that is what the layers of UNets, transformer denoisers, text encoders
and language models have in common. `_ATTENTION`, `_CROSS_ATTENTION` and `_FEED_FORWARD` list the spellings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from svft_diffusion.adapters.layers.kinds import Kind, layer_kind
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import base_module
from svft_diffusion.settings import nearest_hint

PRESETS = {
    "attention": "the projections of every attention: queries, keys, values and outputs",
    "cross-attention": "the projections of the attentions from the picture to the text",
    "feed-forward": "the feed-forward networks of the transformer blocks",
    "attention+feed-forward": "both",
    "all-linear": "every linear layer",
    "all": "every linear layer, convolution, embedding and norm",
}
DEFAULT_PRESET = "attention+feed-forward"

# Each pattern describes a module path from some level of it to the end.
_ATTENTION = (
    r"\w*(attn|attention|Attention)\d?\..+",  # whatever projects in attn1, attn, self_attn, SelfAttention, attention...
    r"to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out",  # diffusers' own names, where the attention has none
)
_CROSS_ATTENTION = (
    r"\w*attn2\..+",  # diffusers: attn1 attends to the picture, attn2 to the text
    r"\w*cross_?(attn|attention)\..+",  # newer denoisers
    r"(EncDecAttention|encoder_attn)\..+",  # decoders of T5 and BART
)
# Only inside of numbered blocks: the embeddings of time and size are called mlp too.
_IN_BLOCK = r"\d+\.(.+\.)?"
_FEED_FORWARD = (
    # diffusers (with ff_context of SD3 and img_mlp of Qwen-Image), CLIP, Llama, GPT-2, ViT
    _IN_BLOCK + r"((audio|img|txt)_)?(ff|ffn|mlp|feed_forward)(_\w+)?\..+",
    _IN_BLOCK + r"DenseReluDense\..+",  # T5
    r"\d+\.(intermediate|output)\.dense",  # BERT, and ViT before transformers 5
    r"\d+\.(fc1|fc2|gate_proj|up_proj|down_proj)",  # no module of its own: BART, OPT, PRX
    r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",  # Flux: proj_out also carries the attention's output
)


def check_preset(preset: str) -> None:
    """Raise `UserError` with the choices if there is no such preset."""
    if preset not in PRESETS:
        raise UserError(f"unknown targets {preset!r}; choose from {', '.join(PRESETS)}")


def adaptable_layers(model: nn.Module) -> dict[str, Kind]:
    """Paths and kinds of all layers of a model that an adapter can go around, in the order of the model.

    * A layer that adapters wrap counts once, under its own path.
    * Of several layers that share one weight, the innermost counts, the first of equals: T5 calls
      ``encoder.embed_tokens``, not ``shared``; GPT-2 owns ``transformer.wte`` before ``lm_head``.
    * A module that the model holds under two paths is left out: an adapter would replace it under one of them only.
      So are modules whose ``forward`` nobody calls (inside `nn.MultiheadAttention`), and those that an IP-Adapter
      hangs into the attention processors, which belong to the IP-Adapter.
    """
    modules: dict[str, nn.Module] = {}
    closed = None  # path of the outermost module whose inside named_modules is listing and nobody may enter
    for path, module in model.named_modules(remove_duplicate=False):
        if closed is not None and path.startswith(f"{closed}."):
            continue
        base = base_module(module)
        closed = path if base is not module or isinstance(module, nn.MultiheadAttention) else None
        if path and ".processor." not in path and layer_kind(base) is not None:
            modules[path] = base
    paths_of_module: dict[int, list[str]] = {}
    paths_of_weight: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths_of_module.setdefault(id(module), []).append(path)
        paths_of_weight.setdefault(id(module.weight), []).append(path)
    return {
        path: kind
        for path, module in modules.items()
        if (kind := layer_kind(module)) is not None
        and len(paths_of_module[id(module)]) == 1
        and path == max(paths_of_weight[id(module.weight)], key=lambda candidate: candidate.count("."))
    }


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers of a model; see `adaptable_layers`."""
    return [path for path, kind in adaptable_layers(model).items() if kind == "linear"]


def matching_layers(model: nn.Module, preset: str, *, train_norm: bool | None = None) -> list[str]:
    """Paths of the layers that ``preset`` names in ``model``, in the order of the model.

    Args:
        model: a UNet, transformer denoiser, text encoder, or any other model whose layers have common names.
        preset: a key of `PRESETS`.
        train_norm: True adds every norm of the whole model that has a weight, with any preset; False leaves the norms
            out of ``all``; None leaves it to the preset.

    Raises:
        UserError: unknown preset, or one that matches nothing; the message lists what would match.
    """
    check_preset(preset)
    kinds = adaptable_layers(model)
    presets = {path: _presets_of(model, path, kind) for path, kind in kinds.items()}
    norms = train_norm or (train_norm is None and preset == "all")
    if not any(preset in named for named in presets.values()):
        raise UserError(f"targets {preset!r} match no layer of {type(model).__name__}; {_remedy(presets)}")
    return [path for path, kind in kinds.items() if preset in presets[path] or (norms and kind == "norm")]


def named_layers(models: Mapping[str, nn.Module], names: Sequence[str], *, norms: bool = False) -> list[str]:
    """Paths of the layers that somebody names in any of ``models``, which are given by component.

    A name is a path, the end of one, or a block around layers: ``to_k``, ``attn1.to_k``, ``down_blocks.1`` or
    ``down_blocks.1.attentions.0.proj_in`` are of a UNet.

    Args:
        norms: whether norms can be named, too.

    Raises:
        UserError: a name matches no layer, or a model has none of the layers.
    """
    paths = {
        component: [path for path, kind in adaptable_layers(model).items() if norms or kind != "norm"]
        for component, model in models.items()
    }
    every = [path for of_model in paths.values() for path in of_model]
    for name in names:
        if not any(_is_called(path, name) for path in every):
            hint = nearest_hint(name, _possible_names(every)) or f"; layers are called {', '.join(every[:3])}, ..."
            raise UserError(f"the layer name {name!r} matches no layer of the {' or '.join(models)}{hint}")
    named = {
        component: [path for path in of_model if any(_is_called(path, name) for name in names)]
        for component, of_model in paths.items()
    }
    for component, of_model in named.items():
        if not of_model:
            raise UserError(f"the layer names match no layer of the {component}, which trains too; name one of its")
    return [path for of_model in named.values() for path in of_model]


def _is_called(path: str, name: str) -> bool:
    """Whether a name is the end of a path, or one of the blocks that it goes through from the start."""
    return path == name or path.endswith(f".{name}") or path.startswith(f"{name}.")


def _possible_names(paths: Sequence[str]) -> set[str]:
    """Every beginning and every end of the paths that stops at a dot."""
    split = [path.split(".") for path in paths]
    ends = {".".join(parts[start:]) for parts in split for start in range(len(parts))}
    return ends | {".".join(parts[:stop]) for parts in split for stop in range(1, len(parts))}


def _presets_of(model: nn.Module, path: str, kind: Kind) -> set[str]:
    """The presets that name a layer. Norms are in none, since `matching_layers` decides on them."""
    if kind == "norm":
        return set()
    presets = {"all"}
    if kind in ("linear", "conv1d"):
        presets.add("all-linear")
        if _ends_like(path, _ATTENTION):
            presets |= {"attention", "attention+feed-forward"}
            if _is_cross_attention(model, path):
                presets.add("cross-attention")
    # Sana and its kind make their feed-forward networks of convolutions.
    if kind in ("linear", "conv1d", "convolution") and _ends_like(path, _FEED_FORWARD):
        presets |= {"feed-forward", "attention+feed-forward"}
    return presets


def _is_cross_attention(model: nn.Module, path: str) -> bool:
    """Whether the attention around a projection attends to something else than its input.

    diffusers' attentions know, whatever they are called: the ``attn2`` of Stable Diffusion 3.5 and of motion modules
    attends to its own input, and the ``attn1`` of the upscaler to the text. Otherwise the name decides.
    """
    ancestor = path
    while "." in ancestor:
        ancestor = ancestor.rpartition(".")[0]
        known = getattr(model.get_submodule(ancestor), "is_cross_attention", None)
        if isinstance(known, bool):
            return known
    return _ends_like(path, _CROSS_ATTENTION)


def _ends_like(path: str, patterns: tuple[str, ...]) -> bool:
    return re.fullmatch(rf"(.*\.)?({'|'.join(patterns)})", path) is not None


def _remedy(presets: dict[str, set[str]]) -> str:
    possible = [name for name in PRESETS if any(name in named for named in presets.values())]
    layers = [path for path, named in presets.items() if named]
    if not layers:
        return "the model has no linear layer, convolution or embedding"
    examples = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
    return f"choose from {', '.join(possible)} (its layers are called {', '.join(examples)})"
