"""An adapter that was saved does the same to the bit, and is the same file when it is saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_cases import Holder, add, base_layer, every_case

from svft_diffusion import load_adapter, save_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.files import AdapterMetadata, metadata_of, read_header


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_case
def test_every_row_comes_back_bit_for_bit(method: str, layer_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a file of the dtype that its base has."""
    models = [{"unet": Holder(base_layer(layer_name).to(dtype))} for _ in range(2)]
    layer = add(models[0]["unet"], method, "a")
    with torch.no_grad():
        for part in layer.trained_parts("a").values():
            part.copy_(part.to(dtype))  # what the file can hold
    metadata = AdapterMetadata("toy", value_dtype=str(dtype).removeprefix("torch."))
    first = save_adapter(models[0], "a", tmp_path / "first.safetensors", metadata=metadata)

    load_adapter(models[1], first, "b")
    loaded = spectral_layers(models[1]["unet"])["layer"]
    assert torch.equal(loaded.get_delta_weight("b"), layer.get_delta_weight("a"))
    again = save_adapter(models[1], "b", tmp_path / "again.safetensors", metadata=metadata_of(read_header(first)))
    assert again.read_bytes() == first.read_bytes()
