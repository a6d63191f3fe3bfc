"""Files as other tools write them, and what those tools make of them: their formulas, written out once more."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_pipeline
from torch import Tensor, nn
from torch.nn import functional

from svft_diffusion import load_adapter, save_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layers import matrix_of
from svft_diffusion.adapters.targets import adaptable_layers
from svft_diffusion.exchange.importing import ImportReport
from svft_diffusion.files import AdapterMetadata

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"

LINEAR = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj")


class Base:
    """Models that an adapter is imported to, fresh ones to load the saved file into, and that file."""

    def __init__(self, folder: Path, unet: nn.Module | None = None) -> None:
        pipe = tiny_pipeline()
        self.models = {"unet": pipe.unet if unet is None else unet, "text_encoder": pipe.text_encoder}
        self.file = folder / "imported.safetensors"

    def saved_and_loaded(self, report: ImportReport, *, unet: nn.Module | None = None) -> dict[str, nn.Module]:
        save_adapter(self.models, report.adapter, self.file, metadata=AdapterMetadata(base_name="tiny"))
        pipe = tiny_pipeline()
        fresh = {"unet": pipe.unet if unet is None else unet, "text_encoder": pipe.text_encoder}
        load_adapter(fresh, self.file, "imported")
        return fresh


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Path -> what the adapter changes in the weight, as a matrix."""
    return {
        path: matrix_of(layer.kind, layer.get_delta_weight(name)).detach().double()
        for path, layer in spectral_layers(model, name).items()
    }


def svdiff_deltas(model: nn.Module, *, norms: bool = True, seed: int = 3) -> dict[str, Tensor]:
    """Shifts as svdiff-pytorch saves them, ``<path>.delta``; some are larger than the singular values."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, kind in adaptable_layers(model).items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        if kind != "norm" or norms:
            count = 1 if kind == "norm" else min(weight.flatten(1).shape)
            deltas[f"{path}.delta"] = 0.15 * torch.randn(count, generator=generator)
    return deltas


def svdiff_model(model: nn.Module, deltas: Mapping[str, Tensor], strength: float) -> nn.Module:
    """What svdiff-pytorch computes with: every weight rebuilt as ``U relu(S + s delta) V^T``."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        layer = model.get_submodule(name.removesuffix(".delta"))
        weight = layer.weight.detach()
        matrix = weight[None] if weight.ndim == 1 else weight.flatten(1)
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rebuilt = (U * functional.relu(S + strength * delta.double())) @ Vh
        layer.weight = nn.Parameter(rebuilt.reshape(weight.shape).to(weight.dtype))
    return model


@dataclass
class OfficialSVFT:
    """One layer of the authors' SVFT code, as its state dict has it."""

    state: dict[str, Tensor]

    @classmethod
    def around(
        cls,
        weight: Tensor,
        *,
        pattern: str,
        off_diag: int,
        seed: int,
        rank: int | None = None,
        fill_orthonormal: bool = False,
    ) -> OfficialSVFT:
        generator = torch.Generator().manual_seed(seed)
        u, s_pre, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        n = len(s_pre) if rank is None else rank
        left_over = len(s_pre) - n
        if fill_orthonormal:
            random_u = torch.linalg.qr(torch.randn(u.shape, generator=generator)).Q
            random_v = torch.linalg.qr(torch.randn(v.T.shape, generator=generator)).Q.T
            u = torch.cat([u[:, :n], random_u[:, :left_over]], dim=1)
            v = torch.cat([v[:n], random_v[:left_over]])
            s_pre = torch.cat([s_pre[:n], torch.zeros(left_over)])
            n = len(s_pre)
        u, s_pre, v = u[:, :n], s_pre[:n], v[:n]
        if pattern == "banded":
            offset = torch.arange(n)[None] - torch.arange(n)[:, None]
            row, column = (offset.abs() <= off_diag).nonzero().T
        else:
            count = n * (2 * off_diag + 1) - off_diag * (off_diag + 1)
            row, column = torch.randint(0, n, (2, count), generator=generator)
        return cls(
            {
                "u": u.contiguous(),
                "s_pre": s_pre.contiguous(),
                "s": torch.randn(len(row), generator=generator) * (2 / len(row)) ** 0.5,
                "gate": torch.tensor([0.7]),
                "v": v.contiguous(),
                "s_pre_row": torch.arange(n),
                "s_pre_col": torch.arange(n),
                "s_row": row.contiguous(),
                "s_col": column.contiguous(),
            }
        )

    def merge_and_unload(self) -> Tensor:
        held = {name: part.double() if part.is_floating_point() else part for name, part in self.state.items()}
        core = torch.diag(held["s_pre"])
        core.index_put_((held["s_row"], held["s_col"]), held["s"] * torch.sigmoid(held["gate"]), accumulate=True)
        return held["u"] @ core @ held["v"]


def svft_state(layers: Mapping[str, OfficialSVFT]) -> dict[str, Tensor]:
    """State dict of a model with these layers."""
    return {
        f"{path}.svft_layer.{part}": tensor for path, layer in layers.items() for part, tensor in layer.state.items()
    }


def lora_factors(
    model: nn.Module, paths: Iterable[str], rank: int = 3, seed: int = 5
) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> up (m, r, ...) and down (r, n, ...) of a random LoRA; of convolutions in LoCon's shapes."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        ones = (1,) * (weight.ndim - 2)
        up = 0.3 * torch.randn(len(weight), rank, *ones, generator=generator)
        factors[path] = up, 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
    return factors


def update_of(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """``scale B A`` in float64, as a matrix."""
    return scale * up.double().flatten(1) @ down.double().flatten(1)


def kohya_file(
    file: Path, prefix: str, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float | None = None
) -> Path:
    tensors = {}
    for path, (up, down) in factors.items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return written(file, tensors)


def written(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file
