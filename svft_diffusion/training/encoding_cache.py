"""What frozen models made of pictures and prompts, kept on disk for later runs.

A file's name is a digest of all that its content follows from: the weights of the encoder, its input, the device and
the version of PyTorch. Nothing is ever out of date, and the folder may be deleted at any time. Damaged files are made
anew. Processes may share the folder: files come whole, and one that another process removed is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.factors.location import parse_size
from svft_diffusion.files.whole_files import is_unfinished, replace_when_whole
from svft_diffusion.models import Conditioning, LatentDistribution, ModelFamily

DEFAULT_SIZE = 20 * 2**30  # bytes

_DIGEST = "sha256"  # key of the files' metadata
# Only files with names that the cache itself gives are ever removed: the folder may hold others.
_NAME = re.compile(r"(?:latents|text_encoder(?:_\d)?)-[0-9a-f]{64}\.safetensors")
_DAY = 24 * 60 * 60  # seconds


def size_limit(given: str | None) -> int:
    """Bytes, of ``--encoding_cache_size``."""
    return DEFAULT_SIZE if given is None else parse_size(given, "--encoding_cache_size")


class EncodingCache:
    """Latents and conditioning of a base model, in ``folder``.

    Args:
        limit: bytes that all files together may take after `evict`.
    """

    def __init__(self, folder: Path, family: ModelFamily, limit: int = DEFAULT_SIZE) -> None:
        self._folder = folder
        self._family = family
        self._limit = limit
        self._in_use: set[str] = set()
        self._digests: dict[str, str] = {}

    def latents(self, pixels: Tensor) -> LatentDistribution:
        """`ModelFamily.encode_pictures` of pictures (B, 3, H, W), each kept by itself."""
        rows = [self._latents_of_one(picture[None]) for picture in pixels]
        return LatentDistribution(*(torch.cat([row[part] for row in rows]) for part in ("mean", "std")))

    def text(self, component: str, token_ids: Tensor) -> Conditioning:
        """`ModelFamily.encode_text` of a table of prompts, kept as a whole."""
        model = getattr(self._family.pipeline, component)
        return self._kept(component, model, token_ids, lambda: self._family.encode_text(component, token_ids))

    def evict(self) -> None:
        """Remove the files used longest ago until the rest fits, but none that this object has read or written."""
        kept = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as files:
            for file in files:
                with contextlib.suppress(OSError):  # another process removed it meanwhile
                    status = file.stat()
                    if _NAME.fullmatch(file.name):
                        kept.append((status.st_mtime_ns, file.name, status.st_size))
                    elif is_unfinished(file.name, _NAME) and status.st_mtime < time.time() - _DAY:
                        os.unlink(file)  # its writer was killed
        total = sum(size for _, _, size in kept)
        for _, name, size in sorted(kept):
            if total <= self._limit:
                break
            if name not in self._in_use:
                with contextlib.suppress(OSError):  # Windows keeps files that somebody reads
                    (self._folder / name).unlink(missing_ok=True)
                    total -= size

    def _latents_of_one(self, pixels: Tensor) -> dict[str, Tensor]:
        def encode() -> dict[str, Tensor]:
            latents = self._family.encode_pictures(pixels)
            return {"mean": latents.mean, "std": latents.std}

        return self._kept("latents", self._family.pipeline.vae, pixels, encode)

    def _kept(
        self, kind: str, model: nn.Module, tensor: Tensor, make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``make`` makes of ``tensor`` by means of ``model``, or made of it before."""
        content = tensor.detach().cpu().contiguous()
        device = next(model.parameters()).device
        key = hashlib.sha256(
            f"{kind}|{self._family.name}|{self._digest_of(kind, model)}|{device.type}|{torch.__version__}|"
            f"{content.dtype}|{tuple(content.shape)}|".encode()
        )
        key.update(content.view(-1).view(torch.uint8).numpy().data)
        file = self._folder / f"{kind}-{key.hexdigest()}.safetensors"
        tensors = _read(file)
        self._in_use.add(file.name)
        if tensors is not None:
            with contextlib.suppress(OSError):  # a folder that only others may write
                os.utime(file)  # eviction goes by the time of the last change
        else:
            tensors = {name: made.detach() for name, made in make().items()}
            _write(file, tensors)
        return {name: kept.to(device) for name, kept in tensors.items()}

    def _digest_of(self, kind: str, model: nn.Module) -> str:
        if kind not in self._digests:
            self._digests[kind] = model_digest({kind: model})
        return self._digests[kind]


def model_digest(models: Mapping[str, nn.Module]) -> str:
    """SHA-256 of all weights of models and of their settings; all weights are read."""
    digest = hashlib.sha256()
    for component in sorted(models):
        model = models[component]
        digest.update(f"{component}|{_settings_of(model)}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            for part in _plain_parts(tensor.detach()):
                values = part.cpu().contiguous()
                digest.update(f"|{name}|{values.dtype}|{tuple(values.shape)}|".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that one of a library's own class (a quantized one) is put together from."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))


def _settings_of(model: nn.Module) -> str:
    """The configuration of a model of diffusers or transformers, without where it was found and by which version."""
    config = getattr(model, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {name: value for name, value in settings.items() if not name.startswith("_") and "version" not in name}
    return json.dumps(kept, sort_keys=True, default=str)


def _read(file: Path) -> dict[str, Tensor] | None:
    """What was written, or None if it is not there or not as it was."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError):
        return None
    return tensors if metadata.get(_DIGEST) == _digest(tensors) else None


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors; where that fails, the next run makes them anew."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with contextlib.suppress(UserError, SafetensorError), replace_when_whole(file) as unfinished:
        save_file(contiguous, unfinished, metadata={_DIGEST: _digest(contiguous)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
