"""Putting adapter layers into a model and taking them out again."""

from __future__ import annotations

from peft import inject_adapter_in_model
from torch import Tensor, nn

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.registration import PREFIX
from svft_diffusion.adapters.token_rows import take_tokens
from svft_diffusion.errors import UserError


def spectral_layers(model: nn.Module, adapter: str | None = None) -> dict[str, SpectralLayer]:
    """Spectral layers of a model by the path of the layer they stand for; those with ``adapter`` if it is given."""
    return {
        path.replace(".base_layer", ""): module
        for path, module in model.named_modules()
        if isinstance(module, SpectralLayer) and (adapter is None or module.has_adapter(adapter))
    }


def adapters_of(model: nn.Module) -> list[str]:
    """Names of the spectral adapters in a model, sorted."""
    return sorted({name for layer in spectral_layers(model).values() for name in layer.options})


def inject(model: nn.Module, config: SpectralConfig, name: str, paths: list[str] | None = None) -> None:
    """Add adapter ``name`` to the layers at ``paths``, or to those that ``config`` targets; it alone is active then.

    Raises:
        UserError: a target can't carry the adapter; the model is as it was.
    """
    state_dict: dict[str, Tensor] | None = None
    if paths is not None:  # the keys alone tell PEFT which layers; their tensors are not read
        state_dict = dict.fromkeys((f"{path}.{PREFIX}values" for path in paths), Tensor())
    inject_adapter_in_model(config, model, name, state_dict=state_dict)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers and transformers ask for it


def remove(model: nn.Module, name: str) -> None:
    """Remove an adapter and its learned tokens; layers without any adapter left become the original modules again.

    Raises:
        UserError: its tokens can't be removed yet; the model is as it was.
    """
    take_tokens(model, name)
    for path, module in list(model.named_modules()):
        if not isinstance(module, SpectralLayer):
            continue
        if module.has_adapter(name):
            module.set_adapter([other for other in module.active_adapters if other != name], inference_mode=True)
            module.delete_adapter(name)
        if not module.options:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    configs = getattr(model, "peft_config", {})
    configs.pop(name, None)
    if hasattr(model, "peft_config") and not configs:
        del model.peft_config
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def refuse_fused(model: nn.Module, action: str) -> None:
    """Raise `UserError` if an adapter is fused into the model's weights."""
    for path, layer in spectral_layers(model).items():
        if layer.merged:
            names = ", ".join(layer.merged_adapters)
            raise UserError(f"can't {action} while {names} is fused (layer {path}); call pipe.unfuse_lora() first")
