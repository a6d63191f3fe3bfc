"""``--base_quantization``: the frozen denoiser in few bits, so that a larger base fits; what trains stays float32.

What an adapter stands on is taken from the full weights before they go: singular factors and digests. So the adapter
file is that of the full base, and loads there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

import torch
from torch import nn

from svft_diffusion.adapters.layers.kinds import matrix_of
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cached_factors_of
from svft_diffusion.files.quantized import FullWeight, is_quantized, keep_full_weight
from svft_diffusion.files.stored_weight import stored_weight
from svft_diffusion.files.weight_digests import digest_of_weight

# Choice -> the package that it needs, and the extra that brings it.
_PACKAGES = {
    "bnb-4bit": ("bitsandbytes", "8bit"),
    "bnb-8bit": ("bitsandbytes", "8bit"),
    "int8": ("torchao", "torchao"),
}


def check_quantization(choice: str) -> None:
    """Raise `UserError` if the package that quantizes is not there."""
    if choice == "none":
        return
    package, extra = _PACKAGES[choice]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--base_quantization {choice} needs the package {package}: pip install 'svft-diffusion[{extra}]'"
        )


def quantize_denoiser(denoiser: nn.Module, choice: str, device: torch.device, adapted: Collection[str]) -> None:
    """Quantize the linear layers of the denoiser's blocks, in place, each on its way to ``device``.

    What is outside of the blocks stays as it is, convolutions, norms and biases too: they are few, and errors in what
    comes in and goes out count most.

    Args:
        choice: one of `_PACKAGES`.
        adapted: paths of the layers that will carry an adapter.

    Raises:
        UserError: the denoiser has no such layer, one of ``adapted`` can't be decomposed, or the package does not
            work here.
    """
    layers = {path: layer for path, layer in denoiser.named_modules() if _in_a_block(path) and type(layer) is nn.Linear}
    if not layers:
        raise UserError(f"--base_quantization: this {type(denoiser).__name__} has no linear layers in blocks")
    kept = _full_weights(denoiser, {path: layer for path, layer in layers.items() if path in adapted})
    quantize = _QUANTIZERS[choice]
    for path, layer in layers.items():
        try:
            quantized = quantize(layer, device)
        except (RuntimeError, NotImplementedError, ImportError, AttributeError, ValueError) as problem:
            reason = " ".join(str(problem).split())
            raise UserError(f"--base_quantization {choice} does not work on {device}: {reason}") from problem
        parent, _, child = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, quantized)
        if path in kept:
            keep_full_weight(quantized, kept[path])


def quantization_in_words(denoiser: nn.Module) -> str:
    """How many layers are quantized, and what that saves."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, nn.Linear) and is_quantized(layer)]
    held = sum(_bytes_of(layer.weight) for layer in layers)
    full = sum(layer.in_features * layer.out_features for layer in layers)
    return f"{len(layers)} linear layers of the denoiser hold {full:,} weights in {held / 2**20:.1f} MiB"


def _full_weights(denoiser: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, FullWeight]:
    full = {}
    for path, layer in layers.items():
        live = layer.weight.detach()
        stored = stored_weight(denoiser, path, live)
        full[path] = live if stored is None else stored
    factors = cached_factors_of({path: matrix_of("linear", weight) for path, weight in full.items()})
    return {path: FullWeight(digest_of_weight(weight), factors[path]) for path, weight in full.items()}


def _in_a_block(path: str) -> bool:
    """Whether a module lies in one of several alike: in a list of modules."""
    return any(part.isdecimal() for part in path.split("."))


def _to_4_bits(layer: nn.Linear, device: torch.device) -> nn.Module:
    """NF4 in blocks of 64 (QLoRA, arXiv 2305.14314), computing in the layer's own dtype."""
    import bitsandbytes

    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    # On some processors it would pack weights anew when a model draws, where not all shapes fit.
    made.support_avx512bf16_for_cpu = False
    return _moved(made, weight, layer, device)


def _to_8_bits(layer: nn.Linear, device: torch.device) -> nn.Module:
    """Rows in int8 with outliers of the input apart (LLM.int8, arXiv 2208.07339)."""
    import bitsandbytes

    weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made = bitsandbytes.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    return _moved(made, weight, layer, device)


def _to_int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """Rows in int8, which are widened for each product; on whatever device torch runs."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer.to(device)
    quantize_(layer, Int8WeightOnlyConfig())
    layer.requires_grad_(False)
    return layer


def _moved(made: nn.Module, weight: nn.Parameter, layer: nn.Linear, device: torch.device) -> nn.Module:
    """Bitsandbytes quantizes a weight when it is moved."""
    made.weight = weight
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made.to(device).train(layer.training)


def _bytes_of(weight: torch.Tensor) -> int:
    """Bytes of a weight with all that it is put together from."""
    if hasattr(weight, "__tensor_flatten__") and type(weight.data) is not torch.Tensor:
        return sum(_bytes_of(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    state = getattr(weight, "quant_state", None)
    return weight.numel() * weight.element_size() + (0 if state is None else _bytes_of(state.absmax))


_QUANTIZERS: dict[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "bnb-4bit": _to_4_bits,
    "bnb-8bit": _to_8_bits,
    "int8": _to_int8,
}
