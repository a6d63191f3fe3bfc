"""An adapter does the same on another machine, in another precision, or says that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor

from svft_diffusion import (
    SiVAConfig,
    SVDiffConfig,
    SVFTConfig,
    VectorFitConfig,
    load_adapter,
    save_adapter,
    unload_adapter,
)
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, load_adapter_state
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cache
from svft_diffusion.files import AdapterMetadata, digests_of_pipeline, layer_names, read_adapter, write_adapter
from svft_diffusion.spectral import SingularFactors

METADATA = AdapterMetadata(base_name="toy")
CONFIGS = {
    "svft plain": SVFTConfig(),
    "svft banded": SVFTConfig(pattern="banded", off_diagonals=2),
    "svft random": SVFTConfig(pattern="random", off_diagonals=1),
    "svft top_k": SVFTConfig(pattern="top_k", off_diagonals=1, init="official"),
    "svdiff": SVDiffConfig(targets="all"),
    "vectorfit": VectorFitConfig(),
    "siva": SiVAConfig(fraction=0.4),
    "siva random": SiVAConfig(fraction=0.4, select="random"),
}
Driver = Callable[[Tensor], SingularFactors]


def random_signs(U: np.ndarray, S: np.ndarray, Vh: np.ndarray) -> SingularFactors:
    signs = np.random.default_rng(len(S) + U.shape[0]).choice([-1.0, 1.0], len(S))
    return SingularFactors(*(torch.tensor(factor).float() for factor in (U * signs, S, signs[:, None] * Vh)))


def float64_driver(weight: Tensor) -> SingularFactors:
    return random_signs(*np.linalg.svd(weight.double().numpy(), full_matrices=False))


def float32_driver(weight: Tensor) -> SingularFactors:
    U, S, Vh = np.linalg.svd(weight.float().numpy().T, full_matrices=False)
    return random_signs(Vh.T, S, U.T)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Driver], None]:
    """From now on, another machine: its own driver of the decomposition, an empty cache of factors."""

    def move(driver: Driver) -> None:
        monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / driver.__name__))
        monkeypatch.setattr(cache, "decompose", driver)

    return move


def write(file: Path, config: SpectralConfig, seed: int = 1, base: int = 0) -> dict[str, Tensor]:
    """Write an adapter of the tiny UNet with random values; returns its updates by layer."""
    models = {"unet": tiny_unet(base)}
    generator = torch.Generator().manual_seed(seed)
    for parameter in add_training_adapter(models, config, "made"):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(models, "made", file, metadata=METADATA)
    return updates(models, "made")


def updates(models: object, adapter: str) -> dict[str, Tensor]:
    unet = models["unet"] if isinstance(models, dict) else models.unet  # type: ignore[attr-defined]
    return {
        path: layer.get_delta_weight(adapter).detach()
        for path, layer in spectral_layers(unet, adapter).items()
        if layer.trained_parts(adapter).keys() & {"values", "norm"}
    }


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    distance = sum(float((found[path] - expected[path]).square().sum()) for path in expected)
    size = sum(float(update.square().sum()) for update in expected.values())
    return (distance / size) ** 0.5


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_driver_gives_the_same_update_without_a_warning(
    tmp_path: Path,
    kind: str,
    elsewhere: Callable[[Driver], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = write(tmp_path / "dog.safetensors", CONFIGS[kind])
    models = {"unet": tiny_unet()}
    for name, driver in {"a": float64_driver, "b": float32_driver}.items():
        elsewhere(driver)
        with caplog.at_level("WARNING"):
            load_adapter(models, tmp_path / "dog.safetensors", name)
        assert not caplog.records
        assert relative_error(updates(models, name), expected) < 1e-3
        unload_adapter(models, name)


def test_the_driver_of_these_tests_gives_another_basis(
    tmp_path: Path, elsewhere: Callable[[Driver], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without alignment, which only `force` leaves out, the banded adapter would do something else."""
    expected = write(tmp_path / "dog.safetensors", CONFIGS["svft banded"])
    elsewhere(float64_driver)
    models = {"unet": tiny_unet()}
    with caplog.at_level("WARNING"):
        load_adapter(models, tmp_path / "dog.safetensors", on_mismatch="force")
    assert relative_error(updates(models, "dog"), expected) > 0.5
    (record,) = caplog.records
    assert "the base has the weights of the training; the update of dog.safetensors differs" in record.getMessage()


def test_two_adapters_from_different_machines_in_one_pipeline(
    tmp_path: Path, elsewhere: Callable[[Driver], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = {"here": write(tmp_path / "here.safetensors", CONFIGS["svft banded"], seed=1)}
    elsewhere(float64_driver)
    expected["there"] = write(tmp_path / "there.safetensors", CONFIGS["svft random"], seed=2)
    models = {"unet": tiny_unet()}
    with caplog.at_level("WARNING"):
        for name in ("there", "here"):
            load_adapter(models, tmp_path / f"{name}.safetensors")
    assert not caplog.records
    for name in ("here", "there"):
        assert relative_error(updates(models, name), expected[name]) < 1e-3
        again = save_adapter(models, name, tmp_path / "again.safetensors", metadata=METADATA)
        fresh = {"unet": tiny_unet()}
        load_adapter(fresh, again)
        assert relative_error(updates(fresh, "again"), expected[name]) < 1e-3


def test_a_checkpoint_from_another_machine_trains_on_from_the_same_update(
    tmp_path: Path, elsewhere: Callable[[Driver], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(tmp_path / "dog.safetensors", CONFIGS["svft top_k"])
    elsewhere(float32_driver)
    models = {"unet": tiny_unet()}
    parameters = add_training_adapter(models, CONFIGS["svft top_k"], "dog")
    tensors = read_adapter(tmp_path / "dog.safetensors")[1]
    with caplog.at_level("WARNING"):
        load_adapter_state(models, "dog", tensors)
    assert not caplog.records
    assert relative_error(updates(models, "dog"), expected) < 1e-3
    assert all(parameter.requires_grad for parameter in parameters)


def test_an_update_that_is_not_the_trained_one_is_refused_or_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that a forged header claims."""
    file = tmp_path / "dog.safetensors"
    expected = write(file, CONFIGS["svft banded"])
    models = {"unet": tiny_unet()}
    layer = models["unet"].mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj
    with torch.no_grad():
        layer.weight[5, 3:20] += 0.05
    header, tensors = read_adapter(file)
    forged = replace(header.base, digests=digests_of_pipeline(models, layer_names(tensors)))
    write_adapter(file, replace(header, base=forged), tensors)
    before = list(models["unet"].state_dict())
    with pytest.raises(UserError, match=r"by 0\.\d+ of its size; layer unet.mid_block.*ff.net.0.proj differs most"):
        load_adapter(models, file)
    assert list(models["unet"].state_dict()) == before and not hasattr(models["unet"], "peft_config")
    with caplog.at_level("WARNING"):
        load_adapter(models, file, on_mismatch="align")
    (record,) = caplog.records
    measured = float(record.getMessage().partition("trained one by ")[2].split()[0])
    assert measured == pytest.approx(relative_error(updates(models, "dog"), expected), rel=0.7)


def test_biases_alone_are_refused_where_no_weight_is_that_of_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have no update that could be measured."""
    file = tmp_path / "dog.safetensors"
    write(file, VectorFitConfig(train_values=False))
    models = {"unet": tiny_unet(1)}
    with pytest.raises(UserError, match=r"0 of 16 adapted weights .*; only on_mismatch=\"force\" loads it") as refused:
        load_adapter(models, file, on_mismatch="align")
    assert "align" not in str(refused.value)
    with caplog.at_level("WARNING"):
        load_adapter(models, file, on_mismatch="force")
        some = {"unet": tiny_unet()}
        with torch.no_grad():
            some["unet"].mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj.weight[0] += 1
        load_adapter(some, file, on_mismatch="align")
    forced, aligned = (record.getMessage() for record in caplog.records)
    assert "0 of 16" in forced and "15 of 16" in aligned
    for message in (forced, aligned):
        assert "None" not in message and "on_mismatch" not in message
        assert message.endswith("dog.safetensors has no singular values by which to measure what it does there")


def test_a_fine_tuned_base_is_aligned_and_another_base_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "dog.safetensors"
    expected = write(file, CONFIGS["svft banded"])
    models = {"unet": tiny_unet()}
    with torch.no_grad():
        for parameter in models["unet"].parameters():
            parameter += 1e-3 * parameter.std() * torch.randn(parameter.shape)
    with pytest.raises(UserError, match="was trained on the base toy"):
        load_adapter(models, file)
    with caplog.at_level("WARNING"):
        load_adapter(models, file, on_mismatch="align")
    assert relative_error(updates(models, "dog"), expected) < 0.3
    assert "was trained on the base toy" in caplog.text and "differs from the trained one by" in caplog.text
    other = {"unet": tiny_unet(5)}
    with pytest.raises(UserError, match="nothing is left of it on this base"):
        load_adapter(other, file, on_mismatch="align")
    assert not hasattr(other["unet"], "peft_config")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_whose_checkpoint_is_there_gives_the_same_update(
    tmp_path: Path, folder: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(tmp_path / "dog.safetensors", CONFIGS["svft banded"])
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    with caplog.at_level("WARNING", logger="svft_diffusion"):
        load_adapter(pipe, tmp_path / "dog.safetensors")
    assert not [record for record in caplog.records if record.name.startswith("svft_diffusion")]
    assert relative_error(updates(pipe, "dog"), expected) < 1e-6


def test_a_16_bit_base_without_its_checkpoint_is_measured_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(tmp_path / "dog.safetensors", CONFIGS["svft banded"])
    pipe = tiny_pipeline().to(dtype=torch.float16)
    with caplog.at_level("WARNING"):
        load_adapter(pipe, tmp_path / "dog.safetensors")
    (record,) = [record for record in caplog.records if record.name.startswith("svft_diffusion")]
    message = record.getMessage()
    assert "the base is in 16 bit" in message
    measured = float(message.partition("trained one by ")[2].split()[0])
    actual = relative_error(updates(pipe, "dog"), expected)
    assert 1e-3 < actual < 0.3
    assert measured == pytest.approx(actual, rel=0.7)


def test_a_new_process_with_an_empty_cache_reads_equal_bits(tmp_path: Path) -> None:
    expected = {kind: write(tmp_path / f"{kind}.safetensors", config) for kind, config in CONFIGS.items()}
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
from test_adapter_portability import updates
from tiny_models import tiny_unet
from svft_diffusion import load_adapter, unload_adapter
models, folder = {{"unet": tiny_unet()}}, Path({str(tmp_path)!r})
for kind, expected in torch.load(folder / "expected.pt").items():
    load_adapter(models, folder / f"{{kind}}.safetensors", "dog")
    found = updates(models, "dog")
    assert found.keys() == expected.keys(), kind
    assert all(torch.equal(found[path], expected[path]) for path in expected), kind
    unload_adapter(models, "dog")
"""
    environment = {**os.environ, "SVFT_DIFFUSION_CACHE": str(tmp_path / "empty cache")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


# Size


def share_of_sketch(file: Path) -> float:
    sketch = read_adapter(file)[1]["sketch"].numel()
    return sketch / (file.stat().st_size - sketch)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_sketch_adds_at_most_a_quarter_to_the_file_of_a_tiny_model(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "dog.safetensors", CONFIGS[kind])
    assert 0 < share_of_sketch(tmp_path / "dog.safetensors") <= 0.25


@pytest.mark.parametrize("kind", ["svft plain", "svft banded", "svft random", "siva"])
def test_the_sketch_adds_at_most_a_quarter_at_full_width(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns))[0]

    def stand_in(weight: Tensor) -> SingularFactors:
        """Factors of some weight of this shape, without the time that a decomposition takes: all values in ties."""
        rows, columns = weight.shape
        S = torch.linspace(2, 0.1, min(rows, columns) // 2).repeat_interleave(2)
        return SingularFactors(orthonormal(rows, len(S)), S, orthonormal(columns, len(S)).T.contiguous())

    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "decompose", stand_in)
    torch.manual_seed(0)
    blocks = torch.nn.ModuleDict(
        {
            str(width): torch.nn.ModuleDict(
                {"to_q": torch.nn.Linear(width, width), "to_k": torch.nn.Linear(768, width)}
            )
            for width in (320, 640)
        }
    )
    models = {"unet": blocks}
    add_training_adapter(models, replace(CONFIGS[kind], target_modules=["to_q", "to_k"]), "made")
    file = save_adapter(models, "made", tmp_path / "dog.safetensors", metadata=METADATA)
    assert 0.09 < share_of_sketch(file) <= 0.25  # the ties fill what the sketches may take
