"""One transformer block of 320 channels at 4096 positions: what training it saves for backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import BANDED, COMPRESSED, LORA, PLAIN, chosen, linear_contenders
from benchmarks.adapters.results import Bar, Result
from benchmarks.adapters.steps import measure_steps
from svft_diffusion.adapters.targets import matching_layers

TARGETS = ("attention", "attention+feed-forward")
_DTYPES = {"float32": torch.float32, "autocast": torch.bfloat16}


def measure(config: BenchmarkConfig) -> list[Result]:
    """Both target presets, in float32 and under bfloat16 autocast (there memory alone: a CPU's time says little)."""
    results: list[Result] = []
    for dtype in _DTYPES:
        for targets in TARGETS:
            torch.manual_seed(0)
            base = _OneBlock(quick=config.quick).to(config.torch_device, _DTYPES[dtype])
            width, tokens = (16, 8) if config.quick else (320, 4096)
            x = torch.randn(1, tokens, width).to(config.torch_device, _DTYPES[dtype])
            text = torch.randn(1, 77, 768).to(config.torch_device, _DTYPES[dtype])
            results += measure_steps(
                "block",
                f"{targets}, {dtype}",
                base,
                matching_layers(base, targets),
                chosen(linear_contenders(dtype), config.contenders),
                {"hidden_states": x.requires_grad_(), "encoder_hidden_states": text},
                rounds=config.rounds if dtype == "float32" or config.device != "cpu" else 0,
                autocast=dtype == "autocast",
            )
    return results


def bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on saved bytes, with compressed activations and without."""
    found = []
    for case in dict.fromkeys(result.case for result in results):
        attention_limit = 1.0 if case.endswith("float32") else 0.5
        limit = 0.4 if "feed-forward" in case else attention_limit
        found.append(Bar("block", case, COMPRESSED, limit, LORA, "extra saved"))
        found.append(Bar("block", case, PLAIN, 1.15, LORA, "extra saved"))
        if case.endswith("float32"):
            found.append(Bar("block", case, BANDED, 1.1, PLAIN))
    return found


class _OneBlock(nn.Module):
    """A denoiser of one block, under the name that blocks have there (presets of targets ask for it)."""

    def __init__(self, *, quick: bool) -> None:
        super().__init__()
        block = BasicTransformerBlock(
            dim=16 if quick else 320,
            num_attention_heads=2 if quick else 8,
            attention_head_dim=8 if quick else 40,
            cross_attention_dim=768,
        )
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        result: Tensor = self.transformer_blocks[0](hidden_states, encoder_hidden_states=encoder_hidden_states)
        return result
