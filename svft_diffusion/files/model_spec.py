"""Header entries by which other tools show a file: ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec) and
kohya's ``ss_*`` and ``sshs_*`` keys. All of them are text. None is a clock time: equal training gives equal bytes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from svft_diffusion.files.container import container_bytes, names_in_file, tensor_bytes
from svft_diffusion.files.header import AdapterHeader

MODEL_SPEC = "1.0.1"
THUMBNAIL_KEY = "modelspec.thumbnail"
LARGEST_THUMBNAIL = 64 * 1024
"""Bytes of a thumbnail's JPEG: one of 256 x 256 pixels takes about 20 kB at good quality."""

_THUMBNAIL_START = "data:image/jpeg;base64,"
_JPEG_START = b"\xff\xd8\xff"
# The part of a file that sshs_legacy_hash is made of.
_LEGACY_START, _LEGACY_LENGTH, _LEGACY_DIGITS = 0x100000, 0x10000, 8
# Setting of a training -> the key that other tools show it by.
_TRAINING_KEYS = {
    "resolution": "ss_resolution",
    "max_train_steps": "ss_max_train_steps",
    "train_batch_size": "ss_batch_size_per_device",
    "gradient_accumulation_steps": "ss_gradient_accumulation_steps",
    "learning_rate": "ss_learning_rate",
    "text_encoder_lr": "ss_text_encoder_lr",
    "lr_scheduler": "ss_lr_scheduler",
    "mixed_precision": "ss_mixed_precision",
    "prior_loss_weight": "ss_prior_loss_weight",
    "seed": "ss_seed",
}


class BaseVersion(NamedTuple):
    """What other tools call a kind of base model."""

    kohya: str  # ss_base_model_version
    architecture: str  # modelspec.architecture, less what follows the slash
    resolution: str
    version_2: bool = False  # ss_v2


_SD_1 = BaseVersion("sd_v1", "stable-diffusion-v1", "512x512")
_SD_2 = BaseVersion("sd_v2", "stable-diffusion-v2-512", "512x512", version_2=True)
_SD_2_V = BaseVersion("sd_v2_768_v", "stable-diffusion-v2-768-v", "768x768", version_2=True)
_SDXL = BaseVersion("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024")
# By the width of the text that the UNet attends to, which no two of them share.
_BASE_VERSIONS = {768: _SD_1, 1024: _SD_2, 2048: _SDXL}
_BY_ARCHITECTURE = {version.architecture: version for version in (_SD_1, _SD_2, _SD_2_V, _SDXL)}


def base_version(pipe: object) -> BaseVersion | None:
    """What other tools call the base of a pipeline or of a mapping of component names to models; None: no name."""
    width = model_config(pipe, "unet").get("cross_attention_dim")
    found = _BASE_VERSIONS.get(width) if isinstance(width, int) else None
    is_v = model_config(pipe, "scheduler").get("prediction_type") == "v_prediction"
    return _SD_2_V if found is _SD_2 and is_v else found


def model_config(pipe: object, component: str) -> dict[str, Any]:
    """The settings of a component; empty where there is none."""
    model = pipe.get(component) if isinstance(pipe, Mapping) else getattr(pipe, component, None)
    return dict(getattr(model, "config", {}))


def shown_metadata(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The entries of an adapter file that other tools show, from its own header and its tensors."""
    title = header.title or header.instance_prompt or f"{header.method} adapter"
    shown = {
        "format": "pt",
        "modelspec.sai_model_spec": MODEL_SPEC,
        "modelspec.implementation": "svft_diffusion",
        "modelspec.architecture": f"{header.base.architecture or header.base.family}/{header.method}",
        "modelspec.title": title,
        "modelspec.usage_hint": _usage_hint(header),
        "ss_network_module": "svft_diffusion",
        "ss_network_args": json.dumps(_network_arguments(header), sort_keys=True),
        "ss_output_name": title,
        "ss_sd_model_name": header.base.name,
    }
    for key, text in (
        ("modelspec.description", header.description),
        ("modelspec.trigger_phrase", trigger_phrase(header)),
        ("modelspec.tags", header.class_word),
        (THUMBNAIL_KEY, None if header.thumbnail is None else thumbnail_text(header.thumbnail)),
    ):
        if text:
            shown[key] = text
    version = _BY_ARCHITECTURE.get(header.base.architecture)
    if version is not None:
        shown |= {"ss_base_model_version": version.kohya, "ss_v2": str(version.version_2)}
    resolution = header.training.get("resolution")
    if isinstance(resolution, int):
        shown["modelspec.resolution"] = f"{resolution}x{resolution}"
    for setting, key in _TRAINING_KEYS.items():
        if header.training.get(setting) is not None:
            shown[key] = str(header.training[setting])
    shown = {key: _encodable(text) for key, text in shown.items()}
    return shown | hashes(tensors, shown)


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Digests of the tensors' bytes, by which sites and pictures refer to a file.

    ``sshs_model_hash`` and ModelSpec's are the SHA-256 of all tensors' bytes; ``sshs_legacy_hash`` is of 64 KiB, one
    MiB into a file that holds the ``ss_*`` entries alone.
    """
    digest = hashlib.sha256()
    for name in names_in_file(tensors):
        digest.update(tensor_bytes(tensors[name]))
    kohya_keys = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    part = container_bytes(tensors, kohya_keys)[_LEGACY_START : _LEGACY_START + _LEGACY_LENGTH]
    return {
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        "sshs_model_hash": digest.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(part).hexdigest()[:_LEGACY_DIGITS],
    }


def thumbnail_text(picture: bytes) -> str:
    """A JPEG picture as ModelSpec has it.

    Raises:
        ValueError: it is no JPEG, or too large.
    """
    if not picture.startswith(_JPEG_START) or len(picture) > LARGEST_THUMBNAIL:
        raise ValueError(f"a thumbnail must be a JPEG of at most {LARGEST_THUMBNAIL} bytes")
    return _THUMBNAIL_START + base64.b64encode(picture).decode()


def thumbnail_bytes(text: str | None) -> bytes | None:
    """The JPEG in `thumbnail_text`; it is not decoded here.

    Raises:
        ValueError: the text is something else.
    """
    if text is None:
        return None
    try:
        if not text.startswith(_THUMBNAIL_START):
            raise ValueError("the thumbnail is no JPEG")
        picture = base64.b64decode(text.removeprefix(_THUMBNAIL_START), validate=True)
    except binascii.Error as problem:
        raise ValueError(f"the thumbnail is not base64: {problem}") from problem
    thumbnail_text(picture)
    return picture


def _usage_hint(header: AdapterHeader) -> str:
    low, high = header.strength_range
    return f"strength {header.suggested_strength:g}, from {low:g} to {high:g}; load with svft_diffusion.load_adapter"


def trigger_phrase(header: AdapterHeader) -> str | None:
    """The words that call the subject: trigger and class word."""
    if header.trigger is None:
        return None
    return f"{header.trigger} {header.class_word}" if header.class_word else header.trigger


def _network_arguments(header: AdapterHeader) -> dict[str, str]:
    names = ("method", "pattern", "off_diagonals", "rank", "fraction", "select", "targets")
    return {name: str(getattr(header, name)) for name in names if getattr(header, name) is not None}


def _encodable(text: str) -> str:
    # A lone surrogate can't stand in a file's header; our own JSON keeps it, escaped.
    return text.encode("utf-8", "replace").decode("utf-8")
