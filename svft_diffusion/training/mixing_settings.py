"""Settings of Cut-Mix-Unmix: several subjects side by side in one picture, and their words kept apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svft_diffusion.data.cut_mix import is_side_by_side_template
from svft_diffusion.errors import UserError
from svft_diffusion.settings import setting

_MIXING = "several subjects in one picture"


@dataclass(frozen=True)
class MixingSettings:
    """The part of `TrainingConfig` about Cut-Mix-Unmix (SVDiff, section 3.3); see `check_mixing_settings`."""

    cut_mix_unmix: bool = setting(
        False, "with --concepts_list: train on two subjects side by side, too, so that they don't mix", group=_MIXING
    )
    cut_mix_probability: float = setting(0.6, "share of the samples that show two subjects", group=_MIXING)
    cut_mix_prompt: str = setting(
        "photo of a {left} on the left and a {right} on the right", "what is said of these", group=_MIXING
    )
    unmix_loss_weight: float = setting(
        1.0,
        "weight of a loss that keeps each subject's word from looking at the other subject (bases with a U-Net; 0: "
        "none)",
        group=_MIXING,
    )

    @property
    def unmixes(self) -> bool:
        """Whether the unmix loss takes part."""
        return self.cut_mix_unmix and self.unmix_loss_weight > 0


def check_mixing_settings(
    settings: MixingSettings, *, several_subjects: bool, torch_compile: bool, caption_dropout: float
) -> None:
    """Check the settings of Cut-Mix-Unmix without looking at any picture.

    Args:
        several_subjects: whether there is a list of subjects.
        torch_compile: whether the denoiser is compiled.
        caption_dropout: share of the samples of one subject without a prompt.

    Raises:
        UserError: values or combinations that can't work.
    """
    if not settings.cut_mix_unmix:
        defaults = MixingSettings()
        for name in ("cut_mix_probability", "cut_mix_prompt", "unmix_loss_weight"):
            if getattr(settings, name) != getattr(defaults, name):
                raise UserError(f"--{name} has no effect without --cut_mix_unmix; add that or leave this out")
        return
    if not several_subjects:
        raise UserError("--cut_mix_unmix is for several subjects; list them with --concepts_list")
    if not 0 < settings.cut_mix_probability <= 1:  # NaN too
        raise UserError(
            f"--cut_mix_probability must be above 0 and at most 1, got {settings.cut_mix_probability:g}; without "
            "--cut_mix_unmix nothing is mixed"
        )
    if settings.cut_mix_probability == 1 and caption_dropout:
        raise UserError(
            "--caption_dropout has no effect with --cut_mix_probability 1: it is for photos of one subject; lower that "
            "or leave this out"
        )
    if not (math.isfinite(settings.unmix_loss_weight) and settings.unmix_loss_weight >= 0):
        raise UserError(f"--unmix_loss_weight must be a finite number, 0 or more, got {settings.unmix_loss_weight:g}")
    if not is_side_by_side_template(settings.cut_mix_prompt):
        raise UserError(
            f"--cut_mix_prompt must hold {{left}} and {{right}} once each, such as "
            f"'{MixingSettings().cut_mix_prompt}', got {settings.cut_mix_prompt!r}"
        )
    if settings.unmixes and torch_compile:
        raise UserError(
            "--torch_compile hides the attention that the unmix loss reads; leave it out, or use --unmix_loss_weight 0"
        )
