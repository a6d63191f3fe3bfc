"""Stage ``readers``: attribute heads, identity embedding and image-text embedding, trained together."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from svft_diffusion.toybox.pretraining.dataset import CAPTIONS, LABELS, NO_LABEL, PICTURES
from svft_diffusion.toybox.pretraining.identities import FAMILY, IDENTITY_LABELS, IDENTITY_PICTURES, ROUND_TRIPS, VIEWS
from svft_diffusion.toybox.pretraining.latents import to_tensor
from svft_diffusion.toybox.readers import ATTRIBUTES, Readers
from svft_diffusion.toybox.tokenizer import MAXIMUM_LENGTH, build_tokenizer

logger = logging.getLogger(__name__)

CHECKPOINT = "readers.pt"


@dataclass(frozen=True)
class ReaderSettings:
    """Settings of one leg of training."""

    minutes: float = 20.0
    families: int = 6  # per batch: that many times eight individuals, two views each
    captioned: int = 64  # pictures with captions per batch
    learning_rate: float = 2e-3
    seed: int = 0


class ReaderBatches:
    """Random batches of family views and of captioned pictures."""

    def __init__(self, work_dir: Path, settings: ReaderSettings) -> None:
        self.settings = settings
        self.random = np.random.default_rng(settings.seed)
        self.direct = np.load(work_dir / IDENTITY_PICTURES, mmap_mode="r")
        self.round_trips = np.load(work_dir / ROUND_TRIPS, mmap_mode="r")
        self.family_labels = np.load(work_dir / IDENTITY_LABELS)
        self.pictures = np.load(work_dir / PICTURES, mmap_mode="r")
        self.labels = np.load(work_dir / LABELS)
        captions = json.loads((work_dir / CAPTIONS).read_text(encoding="utf-8"))
        padded = {"padding": "max_length", "max_length": MAXIMUM_LENGTH, "truncation": True, "return_tensors": "pt"}
        self.token_ids = build_tokenizer()(captions, **padded).input_ids

    def families(self) -> tuple[Tensor, Tensor]:
        """Two views of each member of some families, view pairs adjacent: images (2 F 8, 3, 64, 64), labels."""
        images, labels = [], []
        for family in self.random.integers(0, len(self.direct), self.settings.families):
            for member in range(FAMILY):
                for view in self.random.choice(VIEWS, 2, replace=False):
                    source = self.round_trips if self.random.random() < 0.6 else self.direct
                    images.append(source[family, member, view])
                    labels.append(self.family_labels[family, member, view])
        return to_tensor(np.stack(images)), torch.from_numpy(np.stack(labels))

    def captioned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Captioned pictures, their labels and their token ids."""
        picked = np.sort(self.random.integers(0, len(self.pictures), self.settings.captioned))
        return to_tensor(self.pictures[picked]), torch.from_numpy(self.labels[picked]), self.token_ids[picked]


def disturb(images: Tensor) -> Tensor:
    """Light, noise and sometimes blur: generated pictures are softer than renders."""
    images = images * (0.9 + 0.2 * torch.rand(len(images), 1, 1, 1))
    images = images + 0.05 * torch.rand(()) * torch.randn_like(images)
    if torch.rand(()) < 0.25:
        side = images.shape[-1]
        images = F.interpolate(F.interpolate(images, size=(44, 44), mode="area"), size=(side, side), mode="bilinear")
    return images


def attribute_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum over the attributes of the cross entropy; a body outside the palette has no colour label."""
    losses = [
        F.cross_entropy(logits[name].float(), labels[:, column], ignore_index=NO_LABEL)
        for column, name in enumerate(ATTRIBUTES)
    ]
    return torch.stack(losses).sum()


def identity_loss(embeddings: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss in which each picture must find the other view of its individual among all others."""
    similarity = embeddings @ embeddings.T * scale
    similarity = similarity.masked_fill(torch.eye(len(embeddings), dtype=torch.bool), -1e4)
    return F.cross_entropy(similarity, torch.arange(len(embeddings)) ^ 1)


def caption_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss."""
    logits, matching = images @ texts.T * scale, torch.arange(len(images))
    return 0.5 * (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching))


def train_readers(work_dir: Path, settings: ReaderSettings) -> Readers:
    """Train for ``settings.minutes``, going on from ``work_dir`` if there is a state; the rate falls as a cosine."""
    torch.manual_seed(settings.seed)
    readers, checkpoint = Readers(), work_dir / CHECKPOINT
    if checkpoint.exists():
        readers.load_state_dict(torch.load(checkpoint, weights_only=True))
    optimizer = torch.optim.AdamW(readers.parameters(), lr=settings.learning_rate, weight_decay=0.02)
    batches, started, step = ReaderBatches(work_dir, settings), time.monotonic(), 0
    while (done := (time.monotonic() - started) / 60 / settings.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        views, view_labels = batches.families()
        pictures, labels, token_ids = batches.captioned()
        with torch.autocast("cpu", torch.bfloat16):
            features = readers.features(disturb(torch.cat([views, pictures])))
            logits = readers.attributes(features)
            identities = readers.identity(features[: len(views)])
            shown, told = readers.embed_images(features[len(views) :]), readers.embed_texts(token_ids)
        scales = readers.log_scales.exp().clamp(max=40)
        attributes = attribute_loss(logits, torch.cat([view_labels, labels]))
        individuals = identity_loss(identities.float(), scales[0])
        captions = caption_loss(shown.float(), told.float(), scales[1])
        loss = attributes + individuals + 0.3 * captions
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(readers.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            parts = (attributes.item(), individuals.item(), captions.item())
            logger.info("step %d  attributes %.3f  identity %.3f  captions %.3f  %.0f %%", step, *parts, 100 * done)
            torch.save(readers.state_dict(), checkpoint)
    torch.save(readers.state_dict(), checkpoint)
    return readers.eval()


def export_readers(readers: Readers, path: Path) -> None:
    """Write the readers in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in readers.state_dict().items()}, path)
