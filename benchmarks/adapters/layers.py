"""Single layers with the shapes of Stable Diffusion 1.5's UNet at 512 pixels, and sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import (
    BANDED,
    COMMUNITY_SVDIFF,
    LORA,
    PLAIN,
    SVDIFF,
    chosen,
    convolution_contenders,
    linear_contenders,
)
from benchmarks.adapters.results import Bar, Result
from benchmarks.adapters.steps import measure_steps


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of the UNet: weight (rows, columns), positions of one picture, how many the UNet has."""

    group: str
    rows: int
    columns: int
    tokens: int
    count: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.tokens} tokens"


# Keys and values of the cross-attention read 77 tokens of text, 768 wide.
TEXT_TOKENS = 77
LINEAR_SHAPES = (
    LinearShape("attention", 320, 320, 4096, 30),
    LinearShape("attention", 640, 640, 1024, 30),
    LinearShape("attention", 1280, 1280, 256, 30),
    LinearShape("attention", 1280, 1280, 64, 6),
    LinearShape("attention", 320, 768, TEXT_TOKENS, 10),
    LinearShape("attention", 640, 768, TEXT_TOKENS, 10),
    LinearShape("attention", 1280, 768, TEXT_TOKENS, 12),
    LinearShape("feed-forward", 2560, 320, 4096, 5),
    LinearShape("feed-forward", 320, 1280, 4096, 5),
    LinearShape("feed-forward", 5120, 640, 1024, 5),
    LinearShape("feed-forward", 640, 2560, 1024, 5),
    LinearShape("feed-forward", 10240, 1280, 256, 5),
    LinearShape("feed-forward", 1280, 5120, 256, 5),
    LinearShape("feed-forward", 10240, 1280, 64, 1),
    LinearShape("feed-forward", 1280, 5120, 64, 1),
)
QUICK_LINEAR_SHAPES = (
    LinearShape("attention", 16, 16, 8, 2),
    LinearShape("attention", 16, 24, TEXT_TOKENS, 1),
    LinearShape("feed-forward", 32, 16, 8, 1),
)
# Channels of a 3x3 convolution and height of its input.
CONVOLUTIONS = ((320, 64), (640, 32), (1280, 16))
QUICK_CONVOLUTIONS = ((8, 6),)


class OneLayer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def measure_linear(config: BenchmarkConfig) -> list[Result]:
    """Every shape at every batch size, and the sums over a UNet's layers."""
    shapes = QUICK_LINEAR_SHAPES if config.quick else LINEAR_SHAPES
    contenders = chosen(linear_contenders(config.dtype), config.contenders)
    results: list[Result] = []
    for batch in config.batch_sizes:
        for shape in shapes:
            torch.manual_seed(0)
            base = OneLayer(nn.Linear(shape.columns, shape.rows, bias=shape.group == "feed-forward"))
            x = torch.randn(batch, shape.tokens, shape.columns)
            results += measure_steps(
                "layers",
                _case(str(shape), batch),
                base.to(config.torch_device, config.torch_dtype),
                ["layer"],
                contenders,
                # The text comes from a frozen encoder: nothing in front of these layers asks for a gradient.
                {"x": _input(x, config).requires_grad_(shape.tokens != TEXT_TOKENS)},
                rounds=config.rounds,
                autocast=config.autocast,
            )
        for group in ("attention", "feed-forward"):
            results += _sum(results, [shape for shape in shapes if shape.group == group], batch)
    return results


def measure_convolutions(config: BenchmarkConfig) -> list[Result]:
    """3x3 convolutions at the three widths of the UNet."""
    results: list[Result] = []
    for batch in config.batch_sizes:
        for channels, side in QUICK_CONVOLUTIONS if config.quick else CONVOLUTIONS:
            torch.manual_seed(0)
            base = OneLayer(nn.Conv2d(channels, channels, 3, padding=1))
            results += measure_steps(
                "convolutions",
                _case(f"{channels} channels, {side}x{side}", batch),
                base.to(config.torch_device, config.torch_dtype),
                ["layer"],
                chosen(convolution_contenders(config.dtype), config.contenders),
                {"x": _input(torch.randn(batch, channels, side, side), config).requires_grad_()},
                rounds=config.rounds,
                autocast=config.autocast,
            )
    return results


def linear_bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on the sums over all attention and all feed-forward layers."""
    found = []
    for case in dict.fromkeys(result.case for result in results):
        if case.startswith("all "):
            found.append(Bar("layers", case, BANDED, 1.1, PLAIN))
        if case.startswith("all feed-forward") and case.endswith("batch 2"):
            found.append(Bar("layers", case, PLAIN, 0.9, LORA))
    return found


def convolution_bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on convolutions."""
    found = []
    for case in dict.fromkeys(result.case for result in results):
        found.append(Bar("convolutions", case, SVDIFF, 1.2, LORA))
        if case.startswith(("320", "1280")):
            found.append(Bar("convolutions", case, SVDIFF, 0.25 if case.startswith("1280") else 0.8, COMMUNITY_SVDIFF))
    return found


def _case(shape: str, batch: int) -> str:
    return f"{shape}, batch {batch}"


def _input(tensor: Tensor, config: BenchmarkConfig) -> Tensor:
    return tensor.to(config.torch_device, config.torch_dtype)


def _sum(results: Sequence[Result], shapes: Sequence[LinearShape], batch: int) -> list[Result]:
    """All layers of a group, each as often as the UNet has it: seconds and bytes added up, round by round."""
    totals: dict[str, Result] = {}
    for shape in shapes:
        for result in results:
            if result.case != _case(str(shape), batch):
                continue
            case = _case(f"all {shape.group} layers of the UNet", batch)
            seconds = [shape.count * second for second in result.seconds]
            memory = {kind: shape.count * number for kind, number in result.memory.items() if kind != "peak"}
            if result.contender in totals:
                before = totals[result.contender]
                seconds = [own + more for own, more in zip(before.seconds, seconds, strict=True)]
                memory = {kind: before.memory[kind] + number for kind, number in memory.items()}
            totals[result.contender] = replace(result, case=case, seconds=seconds, memory=memory)
    return list(totals.values())
