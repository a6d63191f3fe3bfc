"""What adapters look like on disk: names of tensors, the file format, the fingerprint of the base model."""

from svft_diffusion.files.adapter_file import (
    FORMAT_VERSION,
    AdapterHeader,
    AdapterMetadata,
    BaseModel,
    read_adapter,
    read_header,
    write_adapter,
)
from svft_diffusion.files.fingerprint import check_base, fingerprint_of_folder, fingerprint_of_pipeline

__all__ = [
    "FORMAT_VERSION",
    "AdapterHeader",
    "AdapterMetadata",
    "BaseModel",
    "check_base",
    "fingerprint_of_folder",
    "fingerprint_of_pipeline",
    "read_adapter",
    "read_header",
    "write_adapter",
]
