"""Stage ``denoiser``: UNet and text encoder trained together on the latents with the v-prediction loss.

To use two cores, run two processes of one thread each (on so small a model far faster than one of two threads):

    OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 \
        -m svft_diffusion.toybox.pretraining denoiser --work_dir runs/toybox
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from svft_diffusion.toybox.pretraining.dataset import CAPTIONS
from svft_diffusion.toybox.pretraining.latents import DEVIATIONS, MEANS
from svft_diffusion.toybox.tokenizer import MAXIMUM_LENGTH, build_tokenizer

logger = logging.getLogger(__name__)

CHECKPOINT = "denoiser.pt"
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of one leg of training; docs/toybox.md tells which legs made the shipped weights."""

    minutes: float = 60.0  # a leg ends here, with its state saved
    batch_size: int = 12  # per process; small batches, because early on steps matter more than samples
    learning_rate: float = 8e-4
    warmup_steps: int = 100
    decay_steps: int = 0  # > 0: this leg is the last one, the rate falls to zero over so many steps
    caption_dropout: float = 0.1  # so that classifier-free guidance has an unconditional branch
    uniform_share: float = 0.25  # the rest of the time steps is drawn where class and colour are decided
    ema_decay: float = 0.999
    save_every_minutes: float = 5.0


def build_unet() -> UNet2DConditionModel:
    """The UNet on 16 x 16 x 8 latents: 5.6 M weights, seven transformer blocks."""
    channels = (64, 96, 128)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=tuple(channel // 32 for channel in channels),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_text_encoder() -> CLIPTextModel:
    """The text encoder: two CLIP layers of width 128 over the world's own vocabulary."""
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAXIMUM_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class ConditionalDenoiser(nn.Module):
    """Text encoder and UNet as one module, so that data-parallel training sees one forward pass."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predicted velocity, the shape of ``noisy`` (N, 8, 16, 16)."""
        states = self.text_encoder(token_ids)[0]
        return self.unet(noisy, timesteps, encoder_hidden_states=states).sample


def draw_timesteps(count: int, uniform_share: float) -> Tensor:
    """Time steps of which ``1 - uniform_share`` follow ``1000 sigmoid(0.6 + 0.8 N(0, 1))``.

    On a 16 x 16 grid layout, class and colour are decided at signal-to-noise ratios of about 0.02 to 1; uniform
    drawing spends most steps elsewhere, and the model then paints the scene long before it learns objects.
    """
    uniform, focused = torch.rand(count), torch.sigmoid(0.6 + 0.8 * torch.randn(count))
    drawn = torch.where(torch.rand(count) < uniform_share, uniform, focused)
    return drawn.mul(1000).long().clamp(0, 999)


class LatentBatches:
    """Random batches of (latent, token ids) from a work folder."""

    def __init__(self, work_dir: Path, settings: DenoiserSettings) -> None:
        self.settings = settings
        self.means = np.load(work_dir / MEANS, mmap_mode="r")
        self.deviations = np.load(work_dir / DEVIATIONS, mmap_mode="r")
        captions = json.loads((work_dir / CAPTIONS).read_text(encoding="utf-8"))
        tokenizer = build_tokenizer()
        padded = {"padding": "max_length", "max_length": MAXIMUM_LENGTH, "truncation": True, "return_tensors": "pt"}
        self.token_ids = tokenizer(captions, **padded).input_ids
        self.no_caption = tokenizer("", **padded).input_ids

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch: latents (N, 8, 16, 16) sampled from the posterior and token ids (N, 24), some without caption."""
        size = self.settings.batch_size
        picked = np.sort(np.random.randint(0, len(self.means), size))
        mean = torch.from_numpy(self.means[picked]).float()
        latents = mean + torch.from_numpy(self.deviations[picked]).float() * torch.randn_like(mean)
        token_ids = self.token_ids[picked].clone()
        token_ids[torch.rand(size) < self.settings.caption_dropout] = self.no_caption
        return latents, token_ids


def train_denoiser(work_dir: Path, model: ConditionalDenoiser, settings: DenoiserSettings) -> None:
    """Train until the time (or the decay) is over; state is saved in ``work_dir`` and gone on from."""
    accelerator = Accelerator(cpu=True)
    checkpoint = work_dir / CHECKPOINT
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = EMAModel(model.parameters(), decay=settings.ema_decay)
    step = load_state(checkpoint, model, average, optimizer) if checkpoint.exists() else 0
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(step, device_specific=True)
    batches = LatentBatches(work_dir, settings)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    first_step, started, saved, shown = step, time.monotonic(), time.monotonic(), 0.0
    while True:
        rate = _learning_rate(step - first_step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        latents, token_ids = batches.draw()
        noise, timesteps = torch.randn_like(latents), draw_timesteps(len(latents), settings.uniform_share)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, token_ids)
        loss = (predicted.float() - target).pow(2).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.step(model.parameters())
        step += 1
        shown = loss.item() if step == first_step + 1 else 0.98 * shown + 0.02 * loss.item()
        if step % 50:
            continue
        # The clocks of two processes differ: the first one's decides for both.
        over = [(time.monotonic() - started) / 60 >= settings.minutes]
        broadcast_object_list(over)
        finished = over[0] or (settings.decay_steps > 0 and step - first_step >= settings.decay_steps)
        if accelerator.is_main_process and (finished or time.monotonic() - saved > 60 * settings.save_every_minutes):
            save_state(checkpoint, accelerator.unwrap_model(model), average, optimizer, step)
            saved = time.monotonic()
        if accelerator.is_main_process and step % 200 == 0:
            seconds = time.monotonic() - started
            speed = (step - first_step) * settings.batch_size * accelerator.num_processes / seconds
            logger.info("step %d  loss %.4f  %.0f samples/s  %.1f min", step, shown, speed, seconds / 60)
        if finished:
            break
    accelerator.end_training()


def _learning_rate(step: int, settings: DenoiserSettings) -> float:
    """Warm-up, then constant; in the last leg a linear fall to zero."""
    rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
    if settings.decay_steps:
        rate *= max(0.0, 1 - step / settings.decay_steps)
    return rate


def save_state(
    path: Path, model: ConditionalDenoiser, average: EMAModel, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write everything that the next leg needs; the old file stays until the new one is whole."""
    state = {
        "model": model.state_dict(),
        "average": [parameter.clone() for parameter in average.shadow_params],
        "average_steps": average.optimization_step,
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(
    path: Path,
    model: ConditionalDenoiser,
    average: EMAModel | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Restore a saved state and return its step; with ``average`` and ``optimizer`` left out, the averaged weights."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    if average is None or optimizer is None:
        with torch.no_grad():
            for parameter, mean in zip(model.parameters(), state["average"], strict=True):
                parameter.copy_(mean)
    else:
        average.shadow_params = state["average"]
        average.optimization_step = state["average_steps"]
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
