"""The networks that judge pictures, by name. Each has columns of its own: their scores can't be compared."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.preprocessing import CLIP_PREPROCESSING, DINO_PREPROCESSING, Preprocessing
from svft_diffusion.models.loading import without_loading_bars
from svft_diffusion.settings import nearest_hint
from svft_diffusion.toybox.readers import images_to_tensor, load_readers
from svft_diffusion.toybox.tokenizer import MAXIMUM_LENGTH, build_tokenizer

_BATCH = 16


class Backbone(ABC):
    """A network that turns pictures, and some of them texts too, into features.

    Attributes:
        name: as in the names of the columns.
        fidelity_label: what subject fidelity by this kind of network is called.
        prompt_label: what prompt fidelity is called, if it reads text.
        model: in fp32 and evaluation mode.
        preprocessing: what is done to pictures, for the report.
    """

    name: str
    fidelity_label: str
    prompt_label = ""
    model: Any  # nn.Module, whose attributes mypy takes for tensors
    preprocessing: str

    @property
    def reads_text(self) -> bool:
        """Whether `embed_texts` works."""
        return bool(self.prompt_label)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (n, d) of pictures of any sizes, on the CPU."""
        starts = range(0, len(pictures), _BATCH)
        return torch.cat([self._embed(pictures[start : start + _BATCH]).cpu() for start in starts])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (n, d) of texts in the space of the pictures; only for those that read text."""
        raise NotImplementedError(f"{self.name} reads no text")

    @abstractmethod
    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of one batch."""

    def facts(self) -> dict[str, str]:
        """What a report says of it."""
        return {"name": self.name, "weights": weights_digest(self.model), "preprocessing": self.preprocessing}


class _Clip(Backbone):
    fidelity_label = "CLIP-I"
    prompt_label = "CLIP-T"

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing) -> None:
        self.name, self.model, self.preprocessing = name, model, str(preprocessing)
        self._tokenizer, self._prepare = tokenizer, preprocessing

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self._prepare(pictures).to(self.model.device)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        read = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.model.text_projection(read.pooler_output).cpu()


class _Dino(Backbone):
    """The features of the class token after the last norm, as DINO's authors evaluate it."""

    fidelity_label = "DINO"

    def __init__(self, name: str, model: ViTModel | Dinov2Model, preprocessing: Preprocessing) -> None:
        self.name, self.model, self.preprocessing = name, model, str(preprocessing)
        self._prepare = preprocessing

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.model(pixel_values=self._prepare(pictures).to(self.model.device)).last_hidden_state[:, 0]


class _ToyReader(Backbone):
    """One of the readers of the embedded model's world: they know no other pictures."""

    def __init__(self) -> None:
        self.model = load_readers()
        self.preprocessing = "64 x 64 pixels (Pillow Lanczos), values from -1 to 1"


class _ToyIdentity(_ToyReader):
    name = "toy-identity"
    fidelity_label = "identity"

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.model.identity(self.model.features(images_to_tensor(pictures)))


class _ToyText(_ToyReader):
    name = "toy-text"
    fidelity_label = "picture"
    prompt_label = "prompt"

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.model.embed_images(self.model.features(images_to_tensor(pictures)))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = build_tokenizer()(
            list(texts), padding="max_length", max_length=MAXIMUM_LENGTH, truncation=True, return_tensors="pt"
        )
        return self.model.embed_texts(tokens.input_ids)


@dataclass(frozen=True)
class _Published:
    """A network on the Hub."""

    kind: str
    hub_name: str
    width: int  # of its image tokens, by which another network under this name is noticed, like ``patch``
    patch: int  # pixels

    @property
    def preprocessing(self) -> Preprocessing:
        return CLIP_PREPROCESSING if self.kind == "clip" else DINO_PREPROCESSING


_PUBLISHED = {
    "clip-vit-b32": _Published("clip", "openai/clip-vit-base-patch32", 768, 32),
    "clip-vit-l14": _Published("clip", "openai/clip-vit-large-patch14", 1024, 14),
    "dino-vits16": _Published("dino", "facebook/dino-vits16", 384, 16),
    "dino-vits8": _Published("dino", "facebook/dino-vits8", 384, 8),
    "dinov2-small": _Published("dinov2", "facebook/dinov2-small", 384, 14),
    "dinov2-base": _Published("dinov2", "facebook/dinov2-base", 768, 14),
}
_TOY: Mapping[str, type[_ToyReader]] = {"toy-identity": _ToyIdentity, "toy-text": _ToyText}

TOY_BACKBONES = tuple(_TOY)
"""Those that know pictures of the embedded model alone."""

USUAL_BACKBONES = ("dino-vits16", "clip-vit-b32")
"""Those of DreamBooth's paper."""


@dataclass(frozen=True)
class BackboneChoice:
    """A name, and the folder of its weights where they are not to come from the Hub."""

    name: str
    folder: Path | None = None


def parse_backbone(text: str) -> BackboneChoice:
    """``NAME`` or ``NAME=FOLDER``.

    Raises:
        UserError: an unknown name (with the nearest one), or a folder that is not there.
    """
    name, equals, path = text.partition("=")
    known = [*_PUBLISHED, *_TOY]
    if name not in known:
        hint = nearest_hint(name, known) or f"; there are {', '.join(known)}"
        raise UserError(f"unknown backbone {name!r}{hint}")
    if not equals:
        return BackboneChoice(name)
    if name in _TOY:
        raise UserError(f"--backbone {text}: {name} is embedded; leave out the folder")
    folder = Path(path).expanduser()
    if not path or not (folder / "config.json").is_file():
        raise UserError(f"--backbone {text}: {path or 'an empty path'} is no folder of a model (with config.json)")
    return BackboneChoice(name, folder)


def load_backbone(choice: BackboneChoice, device: torch.device | None = None) -> Backbone:
    """The network, from its folder or from the Hub (what was downloaded before is not asked for again).

    Raises:
        UserError: one line on why it can't be had.
    """
    if choice.name in _TOY:
        return _TOY[choice.name]()
    published = _PUBLISHED[choice.name]
    source = str(choice.folder or published.hub_name)
    loaders = {"clip": _load_clip, "dino": _load_dino, "dinov2": _load_dinov2}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports weights that are left out on purpose
    try:
        with without_loading_bars():
            backbone = loaders[published.kind](choice.name, source, published.preprocessing)
            _check_size(backbone.model.config, published)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        raise UserError(_why_not_loaded(choice, source, problem)) from problem
    finally:
        transformers.logging.set_verbosity(level)
    backbone.model.to(device or torch.device("cpu"))
    return backbone


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights: says which network it was, wherever it came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _load_clip(name: str, source: str, preprocessing: Preprocessing) -> Backbone:
    model = _complete(CLIPModel, source)
    return _Clip(name, model, CLIPTokenizer.from_pretrained(source), preprocessing)


def _load_dino(name: str, source: str, preprocessing: Preprocessing) -> Backbone:
    return _Dino(name, _complete(ViTModel, source, add_pooling_layer=False), preprocessing)


def _load_dinov2(name: str, source: str, preprocessing: Preprocessing) -> Backbone:
    return _Dino(name, _complete(Dinov2Model, source), preprocessing)


def _complete(kind: Any, source: str, **options: Any) -> Any:
    """A model all of whose weights were read; transformers would make up those that a file lacks."""
    model, report = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks weights of a {kind.__name__}, such as {missing[0]}")
    return model.eval()


def _check_size(config: Any, published: _Published) -> None:
    of_pictures = getattr(config, "vision_config", config)
    found = (of_pictures.hidden_size, of_pictures.patch_size)
    if found != (published.width, published.patch):
        raise ValueError(
            f"it is another network: width {found[0]} and patches of {found[1]} pixels in place of "
            f"{published.width} and {published.patch}"
        )


def _why_not_loaded(choice: BackboneChoice, source: str, problem: BaseException) -> str:
    causes = [problem, problem.__cause__, problem.__context__]
    remedy = f"download it once, or give its folder with --backbone {choice.name}=FOLDER"
    if choice.folder is None and any(isinstance(cause, GatedRepoError | RepositoryNotFoundError) for cause in causes):
        return f"the backbone {choice.name} is not at {source} on the Hugging Face Hub any more; {remedy}"
    if choice.folder is None and isinstance(problem, OSError):
        return (
            f"the backbone {choice.name} is not on this machine, and {source} can't be read from the Hugging Face Hub; "
            f"{remedy}"
        )
    first_line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return f"the backbone {choice.name} can't be loaded from {choice.folder or source}: {first_line}"
