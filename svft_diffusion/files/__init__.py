"""What adapters look like on disk: names of tensors, the file format, the fingerprint of the base model."""

from svft_diffusion.files.adapter_file import (
    adapter_bytes,
    adapter_from_bytes,
    bases_of,
    read_adapter,
    read_header,
    write_adapter,
)
from svft_diffusion.files.basis_records import LayerBasis, pack_bases
from svft_diffusion.files.fingerprint import (
    check_base,
    digests_of_pipeline,
    fingerprint_of_pipeline,
    matches_of_folder,
    matches_of_pipeline,
)
from svft_diffusion.files.header import FORMAT_VERSION, AdapterHeader, AdapterMetadata, BaseModel, metadata_of
from svft_diffusion.files.tensor_names import (
    POSITIONS,
    SKETCH,
    TRAINED_PARTS,
    layer_names,
    split_tensor_name,
    tensor_name,
)
from svft_diffusion.files.weight_digests import BaseDigests, Matches

__all__ = [
    "FORMAT_VERSION",
    "POSITIONS",
    "SKETCH",
    "TRAINED_PARTS",
    "AdapterHeader",
    "AdapterMetadata",
    "BaseDigests",
    "BaseModel",
    "LayerBasis",
    "Matches",
    "adapter_bytes",
    "adapter_from_bytes",
    "bases_of",
    "check_base",
    "digests_of_pipeline",
    "fingerprint_of_pipeline",
    "layer_names",
    "matches_of_folder",
    "matches_of_pipeline",
    "metadata_of",
    "pack_bases",
    "read_adapter",
    "read_header",
    "split_tensor_name",
    "tensor_name",
    "write_adapter",
]
