"""Shrinking an adapter: the numbers that matter most stay, the stated error is the true one, the file is as small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import randomize
from adapter_files import write_models
from test_adapter_portability import float64_driver
from tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor, nn

from svft_diffusion import (
    SiVAConfig,
    SVDiffConfig,
    SVFTConfig,
    VectorFitConfig,
    load_adapter,
    save_adapter,
    swap_adapter,
    unload_adapter,
)
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.injection import adapters_of, spectral_layers
from svft_diffusion.adapters.tokens import add_tokens
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.algebra.shrink import ShrinkReport, ShrunkLayer, shrink_adapter
from svft_diffusion.cli.main import main
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cache
from svft_diffusion.files import AdapterMetadata, read_adapter, read_header

METADATA = AdapterMetadata(base_name="tiny", trigger="sks", training={"steps": 3})
CONFIGS: dict[str, Callable[..., SpectralConfig]] = {
    "svft plain": SVFTConfig,
    "svft banded, rank 4": partial(SVFTConfig, pattern="banded", off_diagonals=1, rank=4),
    "svft random, official init": partial(SVFTConfig, pattern="random", off_diagonals=1, init="official"),
    "svft with biases": partial(SVFTConfig, pattern="top_k", off_diagonals=1, train_bias=True),
    "svdiff": SVDiffConfig,
    "svdiff, scalar norms": partial(SVDiffConfig, norm_shift="scalar", train_bias=True),
    "vectorfit": VectorFitConfig,
    "vectorfit, biases alone": partial(VectorFitConfig, train_values=False, targets="attention+feed-forward"),
    "siva bottom": partial(SiVAConfig, fraction=0.5),
    "siva random": partial(SiVAConfig, fraction=0.4, select="random", train_bias=True),
}
SOME_LAYERS = r"(mid_block|up_blocks\.1\.attentions\.0)\..*(to_[qv]|ff\.net\.2|norm\d?|conv1|proj_in)|conv_out"
MATRICES = {"targets": "attention", "train_norm": False}
every_config = pytest.mark.parametrize("config", CONFIGS)
WITHOUT_SHIFTS = {
    "svft plain": SVFTConfig,
    "svft banded": partial(SVFTConfig, pattern="banded", off_diagonals=2),
    "svft random, official init": partial(SVFTConfig, pattern="random", off_diagonals=1, init="official"),
    "siva": partial(SiVAConfig, fraction=0.4, select="random"),
}


def adapted(make: Callable[..., SpectralConfig], **options: Any) -> dict[str, nn.Module]:
    """The UNet with an adapter; unless told otherwise, in some layers of every kind."""
    models: dict[str, nn.Module] = {"unet": tiny_unet()}
    if "targets" not in {*options, *getattr(make, "keywords", {})}:
        options = {"target_modules": SOME_LAYERS, "train_norm": True, **options}
    add_training_adapter(models, make(**options), "a")
    randomize(models["unet"], "a", scale=0.5)
    return models


def changes(models: dict[str, nn.Module], name: str, layers_of: str = "a") -> dict[str, Tensor]:
    """Everything that an adapter changes, one flat tensor for each layer that ``layers_of`` has."""
    found = {}
    for path, layer in spectral_layers(models["unet"], layers_of).items():
        parts = layer.trained_parts(name)
        weight = layer._weight.detach()
        update = layer.get_delta_weight(name) if parts.keys() & {"values", "norm"} else torch.zeros_like(weight)
        bias = getattr(layer.get_base_layer(), "bias", None)
        shift = parts.get("bias", torch.zeros(0 if bias is None else len(bias)))
        found[path] = torch.cat([update.detach().flatten(), shift.detach()]).double()
    return found


def numbers(models: dict[str, nn.Module], name: str) -> int:
    return sum(
        tensor.numel()
        for layer in spectral_layers(models["unet"], name).values()
        for tensor in layer.trained_parts(name).values()
    )


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    distance = math.fsum(float((found[key] - expected[key]).square().sum()) for key in expected)
    return math.sqrt(distance / math.fsum(float(tensor.square().sum()) for tensor in expected.values()))


def check_report(models: dict[str, nn.Module], report: ShrinkReport) -> None:
    """The stated numbers and errors are those of the explicit updates."""
    whole, left = changes(models, "a"), changes(models, "small")
    assert report.error == pytest.approx(relative(left, whole), abs=2e-6)
    assert [layer.layer for layer in report.layers] == [f"unet.{path}" for path in whole]
    for layer in report.layers:
        path = layer.layer.removeprefix("unet.")
        assert layer.norm == pytest.approx(float(whole[path].norm()), rel=1e-5)
        assert layer.error == pytest.approx(float((left[path] - whole[path]).norm() / whole[path].norm()), abs=2e-6)
    totals = report.to_json()
    assert totals["numbers_before"] == numbers(models, "a") and totals["numbers_after"] == numbers(models, "small")
    assert totals["layers_before"] == len(whole) and totals["layers_after"] == len(
        spectral_layers(models["unet"], "small")
    )


@every_config
@pytest.mark.parametrize("part", [0.03, 0.5])
def test_the_reported_error_is_the_true_one(config: str, part: float) -> None:
    models = adapted(CONFIGS[config])
    before = changes(models, "a")
    keep = int(part * numbers(models, "a"))
    report = shrink_adapter(models, "a", "small", keep=keep)
    check_report(models, report)
    assert 0 < numbers(models, "small") <= keep and 0.01 < report.error < 1
    assert models["unet"].peft_config["small"].pattern == "listed"
    assert all(torch.equal(before[path], change) for path, change in changes(models, "a").items()), "a is as it was"


@every_config
def test_with_everything_kept_it_is_the_same(config: str) -> None:
    models = adapted(CONFIGS[config])
    report = shrink_adapter(models, "a", "same", energy=1.0)
    assert report.error == 0 == sum(layer.error for layer in report.layers)
    assert numbers(models, "same") == numbers(models, "a") == report.to_json()["numbers_after"]
    assert models["unet"].peft_config["same"].pattern == models["unet"].peft_config["a"].pattern
    assert relative(changes(models, "same"), changes(models, "a")) == 0


@pytest.mark.parametrize("config", WITHOUT_SHIFTS)
def test_what_was_shrunk_shrinks_again(config: str) -> None:
    models = adapted(WITHOUT_SHIFTS[config], **MATRICES)
    shrink_adapter(models, "a", "part", keep=numbers(models, "a") // 2)
    keep = numbers(models, "part") // 2
    at_once, in_two_steps = (shrink_adapter(models, *names, keep=keep) for names in (("a", "one"), ("part", "two")))
    assert relative(changes(models, "two", "two"), changes(models, "one", "two")) == 0
    assert [layer.kept for layer in in_two_steps.layers if layer.kept] == [
        layer.kept for layer in at_once.layers if layer.kept
    ]


@pytest.mark.parametrize("config", WITHOUT_SHIFTS)
@pytest.mark.parametrize("keep", [1, 40, 300])
def test_no_other_choice_of_as_many_values_is_closer(config: str, keep: int) -> None:
    """The error is that of the largest entries of all core matrices, which are taken from the updates themselves."""
    models = adapted(WITHOUT_SHIFTS[config], **MATRICES)
    entries = []
    for layer in spectral_layers(models["unet"], "a").values():
        assert layer.factors is not None
        U, _, Vh = layer.factors
        entries.append((U.T @ layer.get_delta_weight("a").flatten(1) @ Vh.T).detach().flatten())
    energies = torch.cat(entries).double().square().sort(descending=True).values
    best = math.sqrt(float(energies[keep:].sum() / energies.sum()))
    assert shrink_adapter(models, "a", "small", keep=keep).error == pytest.approx(best, rel=1e-4)
    assert numbers(models, "small") == keep


def test_svdiff_counts_what_happens_behind_the_relu() -> None:
    models = adapted(SVDiffConfig, **MATRICES)
    layers = spectral_layers(models["unet"], "a")
    for layer in layers.values():
        assert layer.factors is not None
        layer.trained_parts("a")["values"].data.copy_(-1e3 * torch.ones(len(layer.factors.S)))
    sigma = torch.cat([layer.factors.S for layer in layers.values()]).sort(descending=True).values  # type: ignore[union-attr]
    report = shrink_adapter(models, "a", "small", keep=25)
    assert report.error == pytest.approx(float(sigma[25:].norm() / sigma.norm()), rel=1e-5)
    kept = [layer.trained_parts("small")["values"] for layer in spectral_layers(models["unet"], "small").values()]
    assert torch.equal(torch.cat(kept), torch.full((25,), -1e3)), "the shift itself is kept, for other strengths"


@every_config
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_is_kept_with_as_few_numbers_as_possible(config: str, energy: float) -> None:
    models = adapted(CONFIGS[config])
    report = shrink_adapter(models, "a", "small", energy=energy)
    assert 1 - report.error**2 >= energy - 1e-9
    count = numbers(models, "small")
    try:
        fewer = shrink_adapter(models, "a", "fewer", keep=count - 1)
    except UserError as problem:
        assert "kept whole" in str(problem)
    else:
        assert 1 - fewer.error**2 < energy


def test_zeros_are_dropped_without_an_error() -> None:
    models = adapted(VectorFitConfig)
    silent = dict(list(spectral_layers(models["unet"], "a").items())[::2])
    for layer in silent.values():
        for part in layer.trained_parts("a").values():
            part.data.zero_()
    report = shrink_adapter(models, "a", "small", keep=10**6)
    assert report.error == 0 and not spectral_layers(models["unet"], "small").keys() & silent.keys()


def test_shifts_are_kept_whole_by_what_one_of_their_numbers_changes() -> None:
    models = adapted(VectorFitConfig, **MATRICES)
    layers = list(spectral_layers(models["unet"], "a").values())
    for layer in layers:
        for part in layer.trained_parts("a").values():
            part.data.fill_(1e-3)
    with_bias = [layer for layer in layers if "bias" in layer.trained_parts("a")]
    strong, weaker = with_bias[0], with_bias[1]
    strong.trained_parts("a")["bias"].data[0] = 10.0
    weaker.trained_parts("a")["values"].data[2] = 0.1
    length = len(strong.trained_parts("a")["bias"])
    shrink_adapter(models, "a", "both", keep=length + 1)
    assert strong.trained_parts("both").keys() == {"bias"} and weaker.trained_parts("both").keys() == {"values"}
    shrink_adapter(models, "a", "value", keep=length - 1)
    assert not strong.has_adapter("value") or "bias" not in strong.trained_parts("value"), "it does not fit"
    assert numbers(models, "value") == length - 1


# Files


@every_config
@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_what_is_saved_loads_and_saves_the_same(tmp_path: Path, config: str, value_dtype: str) -> None:
    metadata = AdapterMetadata(base_name="tiny", value_dtype=value_dtype)
    models = adapted(CONFIGS[config])
    whole = save_adapter(models, "a", tmp_path / "whole.safetensors", metadata=metadata)
    shrink_adapter(models, "a", "small", keep=numbers(models, "a") // 5)
    file = save_adapter(models, "small", tmp_path / "small.safetensors", metadata=metadata)
    assert file.stat().st_size < whole.stat().st_size
    fresh: dict[str, nn.Module] = {"unet": tiny_unet()}
    load_adapter(fresh, file, "small")
    expected = changes(models, "small", "small")
    assert relative(changes(fresh, "small", "small"), expected) <= (0 if value_dtype == "float32" else 1e-3)
    again = save_adapter(fresh, "small", tmp_path / "again.safetensors", metadata=metadata)
    assert again.read_bytes() == file.read_bytes()
    header = read_header(file)
    assert (header.pattern, header.off_diagonals, header.init) == ("listed", 0, "zero")


def test_a_shrunk_diagonal_pays_for_no_signs(tmp_path: Path) -> None:
    sizes = {}
    for name, make in {"plain": SVFTConfig, "banded": partial(SVFTConfig, pattern="banded", off_diagonals=1)}.items():
        models = adapted(make, **MATRICES)
        shrink_adapter(models, "a", "small", keep=numbers(models, "a") // 8)
        file = save_adapter(models, "small", tmp_path / f"{name}.safetensors", metadata=METADATA)
        layers = adapted_layers(models, "small")
        sizes[name] = [(len(layer.sketch("small")), layer.options["small"].rank) for layer in layers.values()]
        assert len(read_adapter(file)[1]["sketch"]) == sum(length + 20 for length, _ in sizes[name])
    assert min(length for length, _ in sizes["plain"]) == 19
    assert all(length >= 19 + rank // 2 for length, rank in sizes["banded"]) and sizes["banded"]


@pytest.mark.parametrize("config", WITHOUT_SHIFTS)
def test_on_singular_vectors_of_other_signs_it_does_the_same(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = adapted(WITHOUT_SHIFTS[config], **MATRICES)
    shrink_adapter(models, "a", "small", keep=60)
    file = save_adapter(models, "small", tmp_path / "small.safetensors", metadata=METADATA)
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "decompose", float64_driver)
    fresh: dict[str, nn.Module] = {"unet": tiny_unet()}
    load_adapter(fresh, file, "small")
    path = next(iter(spectral_layers(fresh["unet"])))
    ours, theirs = (spectral_layers(model["unet"])[path].factors.U for model in (models, fresh))  # type: ignore[union-attr]
    assert (config in ("svft plain", "siva")) == (relative({"U": theirs}, {"U": ours}) > 0.5), "signs that count follow"
    assert relative(changes(fresh, "small", "small"), changes(models, "small", "small")) <= 1e-3


@pytest.mark.parametrize("on_mismatch", ["error", "align", "force"])
def test_a_file_takes_the_place_of_one_with_as_many_values(tmp_path: Path, on_mismatch: Any) -> None:
    models = adapted(SVFTConfig, targets="attention", train_norm=False)
    files = {}
    for name, first in {"one": 0, "two": 3, "three": 0}.items():
        for index, layer in enumerate(spectral_layers(models["unet"], "a").values()):
            values = layer.trained_parts("a")["values"].data
            values.zero_()
            values[first : first + (2 if name != "three" or index else 3)] = 0.3 + 0.01 * index
        shrink_adapter(models, "a", name, energy=1.0)
        files[name] = save_adapter(models, name, tmp_path / f"{name}.safetensors", metadata=METADATA)
    expected = changes(models, "two")
    fresh: dict[str, nn.Module] = {"unet": tiny_unet()}
    load_adapter(fresh, files["one"], "slot", on_mismatch=on_mismatch)
    with pytest.raises(UserError, match="has another number of values"):
        swap_adapter(fresh, "slot", files["three"], on_mismatch=on_mismatch)
    assert relative(changes(fresh, "slot", "slot"), changes(models, "one")) == 0
    swap_adapter(fresh, "slot", files["two"], on_mismatch=on_mismatch)
    assert relative(changes(fresh, "slot", "slot"), expected) == 0
    again = save_adapter(fresh, "slot", tmp_path / "again.safetensors", metadata=METADATA)
    assert again.read_bytes() == files["two"].read_bytes()


@pytest.mark.parametrize("config", ["svft plain", "svft random, official init", "siva random"])
def test_a_size_is_used_up(tmp_path: Path, config: str) -> None:
    models = adapted(CONFIGS[config])
    whole = save_adapter(models, "a", tmp_path / "whole.safetensors", metadata=METADATA).stat().st_size
    shrink_adapter(models, "a", "least", keep=1)
    least = save_adapter(models, "least", tmp_path / "least.safetensors", metadata=METADATA).stat().st_size
    size = (whole + 2 * least) // 3
    report = shrink_adapter(models, "a", "small", size=size, metadata=METADATA)
    check_report(models, report)
    assert save_adapter(models, "small", tmp_path / "small.safetensors", metadata=METADATA).stat().st_size <= size
    shrink_adapter(models, "a", "more", keep=numbers(models, "small") + 1)
    assert save_adapter(models, "more", tmp_path / "more.safetensors", metadata=METADATA).stat().st_size > size
    all_of_it = shrink_adapter(models, "a", "all", size=10 * whole, metadata=METADATA)
    assert all_of_it.error == 0
    with pytest.raises(UserError, match=f"does not fit in {least - 1:,} bytes: .* it has {least:,}"):
        shrink_adapter(models, "a", "none", size=least - 1, metadata=METADATA)
    assert "none" not in adapters_of(models["unet"])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of keep, size and energy"),
        ({"keep": 3, "energy": 0.5}, "one of keep, size and energy"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"size": 0}, "at least 1 byte"),
        ({"size": 1000}, "needs the metadata"),
        ({"energy": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"energy": 1.01}, "got 1.01"),
        ({"energy": math.nan}, "got nan"),
    ],
)
def test_amounts_that_can_not_be_are_refused(options: dict[str, Any], message: str) -> None:
    models = adapted(SVFTConfig)
    with pytest.raises(UserError, match=message):
        shrink_adapter(models, "a", "small", **options)
    assert adapters_of(models["unet"]) == ["a"]


def test_what_can_not_be_shrunk_is_refused() -> None:
    models = adapted(partial(VectorFitConfig, train_values=False), **MATRICES)
    shortest = min(len(layer.trained_parts("a")["bias"]) for layer in spectral_layers(models["unet"], "a").values())
    with pytest.raises(UserError, match=f"keep at least {shortest}"):
        shrink_adapter(models, "a", "small", keep=shortest - 1)
    with pytest.raises(UserError, match="no adapter 'b'"):
        shrink_adapter(models, "b", "small", keep=5)
    with pytest.raises(UserError, match="already loaded"):
        shrink_adapter(models, "a", "a", keep=5)
    for layer in spectral_layers(models["unet"], "a").values():
        layer.trained_parts("a")["bias"].data.zero_()
    with pytest.raises(UserError, match="changes nothing"):
        shrink_adapter(models, "a", "small", keep=50)
    with pytest.raises(UserError, match="pattern listed comes with numbers_of_values"):
        SpectralConfig(pattern="listed")
    with pytest.raises(UserError, match="pattern listed comes with numbers_of_values"):
        SpectralConfig(pattern="plain", numbers_of_values={"layer": 3})


@pytest.mark.parametrize("count", [0, 65])
def test_more_values_than_places_are_refused(count: int) -> None:
    models: dict[str, nn.Module] = {"unet": tiny_unet()}
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for method in ("svft", "vectorfit"):
        places = min(models["unet"].get_submodule(path).weight.shape) ** (2 if method == "svft" else 1)  # type: ignore[arg-type]
        config = SpectralConfig(
            method=method, pattern="listed", numbers_of_values={path: count and places + 1}, target_modules=[path]
        )
        with pytest.raises(UserError, match=rf"layer {path}: it has .* {count and places + 1} are listed"):
            add_training_adapter(models, config, "a")


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_models(tmp_path)
    out = tmp_path / "small.safetensors"
    arguments = ["shrink", str(files.dog.parent), "--base", str(files.base), "-o", str(out)]
    assert main([*arguments, "--energy", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "kept " in text and "error 0.3" in text and f"{out.stat().st_size / 1000:.1f} kB" in text
    assert main([*arguments, "--energy", "0.9"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    size = 2 * out.stat().st_size // 3
    assert main([*arguments, "--size", f"{size / 1000}kB", "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out.stat().st_size <= size and report["error"] > 0.3
    before, after = read_header(files.dog), read_header(out)
    assert (after.trigger, after.base.name) == (before.trigger, before.base.name) == ("sks", "tiny")
    assert report["output"] == str(out) and report["bytes_before"] == files.dog.stat().st_size
    pipe = tiny_pipeline()
    load_adapter(pipe, out, "small")
    unload_adapter(pipe, "small")
    moved = ["--base", str(files.other_base), "--keep", "9", "--overwrite", "--on_mismatch", "force"]
    assert main([*arguments, *moved]) == 0
    assert read_header(out).base.name == "other-base"


@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_learned_tokens_stay_and_count(tmp_path: Path, value_dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    add_training_adapter({"unet": pipe.unet}, SVFTConfig(targets="attention"), "a")
    randomize(pipe.unet, "a")
    row = torch.linspace(-1, 1, pipe.text_encoder.config.hidden_size)
    add_tokens(pipe, "a", {"text_encoder": {"<new>": row}})
    metadata = AdapterMetadata(base_name="tiny", value_dtype=value_dtype)
    file = save_adapter(pipe, "a", tmp_path / "whole.safetensors", metadata=metadata)
    out, size = tmp_path / "small.safetensors", file.stat().st_size // 2
    arguments = ["shrink", str(file), "--base", str(tmp_path / "base"), "-o", str(out), "--overwrite", "--json"]
    capsys.readouterr()
    assert main([*arguments, "--size", str(size)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out.stat().st_size <= size
    header, tensors = read_adapter(out)
    assert header.tokens == {"text_encoder": ["<new>"]} and header.value_dtype == value_dtype
    assert torch.allclose(tensors["text_encoder.tokens"], row[None], atol=1e-3)
    assert main([*arguments, "--keep", str(report["numbers_after"] + 1)]) == 0
    assert out.stat().st_size > size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "5"], "say with --base where the base model is"),
        (["--base", "{base}", "--size", "10"], "does not fit in 10 bytes: with as little as possible it has"),
        (["--base", "{base}", "--energy", "2"], "in (0, 1]"),
        (["--base", "{other}", "--keep", "5"], "trained on"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_the_command_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_models(tmp_path)
    capsys.readouterr()  # the progress of writing them
    out = tmp_path / "small.safetensors"
    given = [text.format(base=files.base, other=files.other_base) for text in arguments]
    assert main(["shrink", str(files.dog), *given, "-o", str(out)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not out.exists()


@pytest.mark.parametrize("text", ["20 parsecs", "kB", "-3kB", "1e3"])
def test_a_size_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["shrink", "x.safetensors", f"--size={text}", "-o", "y.safetensors"])
    assert stopped.value.code == 2 and "such as 20kB" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("20kB", 20_000), ("20KiB", 20_480), ("1.5 MB", 1_500_000), ("700", 700)])
def test_sizes(text: str, size: int) -> None:
    from svft_diffusion.cli.shrink import _parser

    assert _parser().parse_args(["x", "--size", text, "-o", "y"]).size == size


def test_a_loss_that_leaves_little_is_a_warning() -> None:
    layer = ShrunkLayer("unet.a", numbers=10, kept=1, norm=2.0, error=0.9)
    assert ShrinkReport("small", [layer], 0.9).warning is not None
    assert ShrinkReport("small", [layer], 0.4).warning is None
