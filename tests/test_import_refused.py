"""Files that can't be imported: one line that says why not, and models and targets are as they were."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from adapted_models import digest_of_base
from adapter_files import write_models
from foreign_files import (
    LINEAR,
    Base,
    OfficialSVFT,
    lora_factors,
    svdiff_deltas,
    svft_state,
    written,
)
from tiny_models import tiny_unet
from torch import Tensor, nn

from svft_diffusion.adapters import loaded_adapters
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.cli import import_adapter as command
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.importing import import_adapter


def _svft_of(model: nn.Module) -> dict[str, Tensor]:
    weight = model.get_submodule(LINEAR[0]).weight
    return svft_state({LINEAR[0]: OfficialSVFT.around(weight, pattern="banded", off_diag=1, seed=0)})


def _lora_of(model: nn.Module) -> dict[str, Tensor]:
    up, down = lora_factors(model, [LINEAR[0]])[LINEAR[0]]
    return {f"unet.{LINEAR[0]}.lora_B.weight": up, f"unet.{LINEAR[0]}.lora_A.weight": down}


def _changed(tensors: dict[str, Tensor], ending: str, tensor: Tensor | None) -> dict[str, Tensor]:
    name = next(name for name in tensors if name.endswith(ending))
    rest = {other: held for other, held in tensors.items() if other != name}
    return rest if tensor is None else {**rest, name: tensor}


def _bad_files() -> dict[str, tuple[dict[str, Tensor], str]]:
    unet, other = tiny_unet(), tiny_unet(1)
    svft, lora, svdiff = _svft_of(unet), _lora_of(unet), svdiff_deltas(unet)
    nan = torch.tensor(float("nan"))
    return {
        "foreign": ({"weight": torch.ones(2)}, "none of SVDiff"),
        "svdiff of another architecture": (svdiff_deltas(tiny_unet(block_out_channels=(8, 24))), "another base"),
        "svdiff with a foreign layer": (svdiff | {"unknown.delta": torch.ones(2)}, "no layer unknown"),
        "svdiff with nan": (_changed(svdiff, "conv_in.delta", nan.repeat(16)), "NaN"),
        "svft of another base": (_svft_of(other), "another base"),
        "svft of another architecture": (_changed(svft, ".u", torch.ones(30, 24)), "another base"),
        "svft without gate": (_changed(svft, ".gate", None), "lacks svft_layer.gate"),
        "svft with long s": (_changed(svft, ".s", torch.ones(9999)), "do not go together"),
        "svft out of range": (_changed(svft, ".s_row", torch.full((70,), 99)), "outside"),
        "svft below range": (_changed(svft, ".s_col", torch.full((70,), -1)), "outside"),
        "svft with infinity": (_changed(svft, ".s", torch.full((70,), float("inf"))), "NaN or infinite"),
        "lora of other sizes": (_changed(lora, "lora_B.weight", torch.ones(25, 3)), "another base"),
        "lora of other ranks": (_changed(lora, "lora_B.weight", torch.ones(24, 2)), "do not fit"),
        "lora with one factor": (_changed(lora, "lora_B.weight", None), "only one of the two"),
        "lora with nan": (_changed(lora, "lora_B.weight", nan.repeat(24, 3)), "NaN"),
        "lora of other layers": ({name.replace("mid_block", "middle"): t for name, t in lora.items()}, "none of its"),
        "lora too large": ({name: 1e30 * t for name, t in lora.items()}, "too large for float32"),
        "lora with two alphas": (lora | {f"unet.{LINEAR[0]}.alpha": torch.ones(2)}, "no single number"),
        "lora twice": (lora | {f"unet.{LINEAR[0]}.lora.down.weight": torch.ones(3, 24)}, "twice"),
        "dora": (lora | {f"unet.{LINEAR[0]}.lora_magnitude_vector": torch.ones(24)}, "DoRA"),
        "dora of kohya": (lora | {f"unet.{LINEAR[0]}.dora_scale": torch.ones(24, 1)}, "DoRA, no plain LoRA"),
        "lokr": ({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "LoKr"),
        "lora beside loha": (lora | {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        "svdiff beside lora": (svdiff | lora, "mixes a LoRA with another format: .*delta"),
        "lora in complex numbers": (
            _changed(lora, "lora_B.weight", torch.ones(24, 3, dtype=torch.complex64)),
            "C64",
        ),
        "loha": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        "empty": ({"lora_unet_x.lora_up.weight": torch.ones(2, 0)}, "no elements"),
    }


BAD_FILES = _bad_files()


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_does_not_fit_leaves_the_models_as_they_were(tmp_path, case):
    tensors, message = BAD_FILES[case]
    base = Base(tmp_path)
    before = digest_of_base(base.models["unet"])
    with pytest.raises(UserError, match=message) as refused:
        import_adapter(base.models, written(tmp_path / "bad.safetensors", tensors))
    assert "\n" not in str(refused.value)
    assert loaded_adapters(base.models) == [] and digest_of_base(base.models["unet"]) == before
    assert not spectral_layers(base.models["unet"])


class Executed:
    """Unpickling this creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_what_is_no_safetensors_file_is_never_opened(tmp_path):
    trap = tmp_path / "executed"
    contents = {
        "pickle.bin": pickle.dumps(Executed(trap)),
        "page.safetensors": b"<!DOCTYPE html><html><body>not found</body></html>",
        "empty.safetensors": b"",
        "short.safetensors": (1000).to_bytes(8, "little") + b"{}",
        "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
    }
    torch.save({"conv_in.delta": Executed(trap)}, tmp_path / "zip.pt")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.safetensors").mkdir()
    for name in [*contents, "zip.pt", "folder.safetensors", "missing.safetensors"]:
        with pytest.raises(UserError, match=name):
            import_adapter(Base(tmp_path).models, tmp_path / name)
    with pytest.raises(UserError, match="never opened"):
        import_adapter(Base(tmp_path).models, tmp_path / "zip.pt")
    assert not trap.exists()


def test_options_are_checked(tmp_path):
    base = Base(tmp_path)
    svdiff = written(tmp_path / "svdiff.safetensors", svdiff_deltas(base.models["unet"]))
    lora = written(tmp_path / "lora.safetensors", _lora_of(base.models["unet"]))
    for files, options, message in (
        (svdiff, {"pattern": "plain"}, "no other pattern"),
        (lora, {"pattern": "diagonal"}, "unknown pattern"),
        (lora, {"pattern": "plain", "off_diagonals": 1}, "no off-diagonals"),
        (lora, {"pattern": "banded", "off_diagonals": 0}, "does not fit"),
        (lora, {"off_diagonals": 24}, "0 to 23"),
        (lora, {"off_diagonals": -1}, "does not fit"),
        ([svdiff, lora], {}, "one by one"),
        ([svdiff, svdiff], {}, "another base"),
        ([lora, lora], {}, "another name does too"),
        ([], {}, "no file"),
    ):
        with pytest.raises(UserError, match=message):
            import_adapter(base.models, files, **options)
    assert not spectral_layers(base.models["unet"])


def test_an_import_joins_the_adapters_that_are_there(tmp_path):
    base = Base(tmp_path)
    file = written(tmp_path / "svdiff.safetensors", svdiff_deltas(tiny_unet()))
    first = import_adapter(base.models, file, "first")
    import_adapter(base.models, written(tmp_path / "lora.safetensors", _lora_of(tiny_unet())), "second")
    assert loaded_adapters(base.models) == ["first", "second"]
    layers = spectral_layers(base.models["unet"]).values()
    parts = [part for layer in layers for name in layer.options for part in layer.trained_parts(name).values()]
    assert parts and not any(part.requires_grad for part in parts)
    assert {name for layer in layers for name in layer.active_adapters} == {"first", "second"}
    with pytest.raises(UserError, match="already loaded"):
        import_adapter(base.models, file, first.adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    write_models(models)
    return models


def test_command_leaves_its_target_alone_when_it_refuses(folder, tmp_path):
    lora = written(tmp_path / "lora.safetensors", _lora_of(tiny_unet()))
    foreign = written(tmp_path / "foreign.safetensors", {"weight": torch.ones(2)})
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    base = ["--base", str(folder / "base")]
    for arguments, message in (
        ([lora, *base, "-o", output], "already"),
        ([foreign, *base, "-o", output, "--overwrite"], "none of"),
        ([folder / "adapters" / "style.safetensors", *base, "-o", output, "--overwrite"], "nothing to import"),
        ([lora, "--base", folder / "none", "-o", output, "--overwrite"], "no such base"),
        ([lora, *base, "-o", tmp_path], "is a folder"),
        ([lora, *base, "-o", lora, "--overwrite"], "files to read"),
        ([lora, *base, "-o", foreign / "out.safetensors"], "can't write"),
    ):
        with pytest.raises(UserError, match=message):
            command.run([str(argument) for argument in arguments])
        assert output.read_bytes() == b"precious"
    command.run([str(lora), *base, "-o", str(output), "--overwrite"])
    assert output.read_bytes() != b"precious"
