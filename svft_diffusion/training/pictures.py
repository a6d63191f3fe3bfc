"""The pictures of a run, once the base model is there: class pictures, training sizes, and the order of it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from diffusers import DiffusionPipeline
from torch import nn

from svft_diffusion.data.buckets import automatic_sizes, parse_sizes
from svft_diffusion.data.class_images import ClassImageRecipe, class_pictures
from svft_diffusion.data.cut_mix import CutMix
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture, distinct_prompts
from svft_diffusion.data.order import PictureOrder
from svft_diffusion.errors import UserError
from svft_diffusion.models import base_display_name
from svft_diffusion.training.batches import Stream
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.encoding_cache import model_digest
from svft_diffusion.training.mixing import Mixing
from svft_diffusion.training.subjects import Subject


def cutter_of(config: TrainingConfig, pixel_multiple: int) -> Cutter:
    """How the run's pictures are cut.

    Args:
        pixel_multiple: what the base model's heights and widths are multiples of.

    Raises:
        UserError: it can't draw pictures of these sizes.
    """
    assert config.resolution is not None
    sizes = [(config.resolution, config.resolution)]
    if config.aspect_ratio_buckets is not None:
        listed = parse_sizes(config.aspect_ratio_buckets)
        sizes = automatic_sizes(config.resolution, pixel_multiple) if listed is None else listed
    for height, width in sizes:
        if height % pixel_multiple or width % pixel_multiple:
            raise UserError(
                f"--aspect_ratio_buckets: sides must be multiples of {pixel_multiple} with this base, got "
                f"{height},{width}"
            )
    return Cutter(
        sizes=tuple(sizes),
        center_crop=config.center_crop,
        interpolation=config.image_interpolation_mode,
        seed=config.seed,
        random_flip=config.random_flip,
        masked=config.masked_loss,
    )


def streams_of(
    config: TrainingConfig,
    instance: Sequence[Picture],
    classes: Sequence[Picture],
    cutter: Cutter,
    mixing: Mixing | None = None,
) -> list[Stream]:
    """Photos first, then class pictures if there are any.

    Args:
        mixing: how two subjects are named side by side; None: no sample shows two.
    """
    sizes = [cutter.size_of(picture) for picture in instance]
    several = len(set(sizes)) > 1

    def order(pictures: Sequence[Picture], shapes: Sequence[object], purpose: str) -> PictureOrder:
        return PictureOrder(
            [picture.subject for picture in pictures],
            shapes,
            turn_length=config.train_batch_size if several else 1,
            seed=config.seed,
            purpose=purpose,
        )

    streams = [
        Stream(
            "instance",
            instance,
            order(instance, sizes, "instance"),
            sizes,
            caption_dropout=config.caption_dropout,
            seed=config.seed,
        )
    ]
    if classes and config.prior_source == "base":
        # The photos themselves: each takes its own turn again, with the class prompt.
        streams.append(Stream("class", classes, order(classes, sizes, "instance"), sizes))
    elif classes:
        streams.append(Stream("class", classes, order(classes, [None] * len(classes), "class"), None))
    return streams if mixing is None else [_mixed(config, stream, mixing) for stream in streams]


def _mixed(config: TrainingConfig, stream: Stream, mixing: Mixing) -> Stream:
    """A stream with mixed samples; the class pictures of one are mixed as its photos are."""
    mix = CutMix(
        [picture.subject for picture in stream.pictures],
        stream.order,
        mixing.instance_prompts if stream.kind == "instance" else mixing.class_prompts,
        probability=config.cut_mix_probability,
        seed=config.seed,
        purpose="instance" if config.prior_source == "base" else stream.kind,
    )
    return dataclasses.replace(stream, mix=mix)


def prompts_of(
    config: TrainingConfig, instance: Sequence[Picture], classes: Sequence[Picture], mixing: Mixing | None
) -> list[str]:
    """Every prompt of the run once: of pictures, of two side by side, and the empty one of dropped captions."""
    of_mixed = [] if mixing is None else mixing.prompts
    return list(
        dict.fromkeys([*distinct_prompts(instance, classes), *of_mixed, *([""] * (config.caption_dropout > 0))])
    )


def prior_pictures(
    config: TrainingConfig,
    pipeline: DiffusionPipeline,
    subjects: Sequence[Subject],
    dtype: torch.dtype,
    *,
    on_progress: Callable[[], None] = lambda: None,
    users: ExitStack | None = None,
) -> list[Picture]:
    """What keeps the class: pictures of it, drawn if missing, or the photos themselves with the class prompt.

    Args:
        pipeline: the base model, which carries no adapter yet.
        dtype: the precision it was loaded in.
        on_progress: see `class_pictures`.
        users: see `class_pictures`.
    """
    if config.prior_source == "base":
        return [
            dataclasses.replace(picture, prompt=subject.class_prompt or "")
            for subject in subjects
            for picture in subject.pictures
        ]
    assert config.resolution is not None
    recipe = ClassImageRecipe(
        base_model=base_display_name(config.pretrained_model_name_or_path),
        base_digest=model_digest(
            {n: model for n, model in pipeline.components.items() if isinstance(model, nn.Module)}
        ),
        precision=str(dtype).removeprefix("torch."),
        scheduler=type(pipeline.scheduler).__name__,
        scheduler_settings={
            name: value for name, value in sorted(pipeline.scheduler.config.items()) if not name.startswith("_")
        },
        prompts=[],
        seed=config.seed,
        resolution=config.resolution,
        num_inference_steps=config.prior_generation_num_inference_steps,
        guidance_scale=config.prior_generation_guidance_scale,
    )
    pictures = []
    for number, subject in enumerate(subjects):
        assert subject.class_data_dir is not None  # `check_data_settings`
        pictures += class_pictures(
            pipeline,
            subject.class_data_dir,
            dataclasses.replace(recipe, prompts=subject.class_prompts),
            count=config.num_class_images,
            batch_size=config.sample_batch_size,
            caption_source=config.caption_source,
            subject=number,
            on_progress=on_progress,
            users=users,
        )
    return pictures
