"""What adapters look like on disk: names of tensors, the file format, the fingerprint of the base model."""

from svft_diffusion.files.adapter_file import bases_of, read_adapter, read_header, write_adapter
from svft_diffusion.files.basis_records import LayerBasis, pack_bases
from svft_diffusion.files.fingerprint import check_base, fingerprint_of_folder, fingerprint_of_pipeline
from svft_diffusion.files.header import FORMAT_VERSION, AdapterHeader, AdapterMetadata, BaseModel
from svft_diffusion.files.tensor_names import (
    POSITIONS,
    SKETCH,
    TRAINED_PARTS,
    layer_names,
    split_tensor_name,
    tensor_name,
)

__all__ = [
    "FORMAT_VERSION",
    "POSITIONS",
    "SKETCH",
    "TRAINED_PARTS",
    "AdapterHeader",
    "AdapterMetadata",
    "BaseModel",
    "LayerBasis",
    "bases_of",
    "check_base",
    "fingerprint_of_folder",
    "fingerprint_of_pipeline",
    "layer_names",
    "pack_bases",
    "read_adapter",
    "read_header",
    "split_tensor_name",
    "tensor_name",
    "write_adapter",
]
