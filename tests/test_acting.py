"""Adapters that follow a schedule or act in a region, on tiny pipelines of every family."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from torch import Tensor

import svft_diffusion
from svft_diffusion import SVDiffConfig, SVFTConfig, per_sample_adapters, set_adapters
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import components_of
from svft_diffusion.sampling.acting import acting_adapters
from svft_diffusion.sampling.adapter_use import AdapterUse, parse_use, use_in_picture, use_to_json
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.sampling.regions import Region, read_mask, shares
from svft_diffusion.sampling.step_schedule import StepSchedule, parse_schedule, part_done

ALWAYS = StepSchedule(((0.0, 1.0),))
LEFT, RIGHT = Region((0.0, 0.0, 0.5, 1.0)), Region((0.5, 0.0, 1.0, 1.0))
FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": tiny_pipeline,
    "sdxl": tiny_pipeline_sdxl,
    "sd3": tiny_pipeline_sd3,
    "flux": tiny_pipeline_flux,
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def with_adapters(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Frozen adapters "dog" and "cat" in the denoiser and the first text encoder."""
    pipe.set_progress_bar_config(disable=True)
    models = {
        name: model for name, model in components_of(pipe).items() if name in ("unet", "transformer", "text_encoder")
    }
    generator = torch.Generator().manual_seed(0)
    for name, config in (("dog", SVFTConfig()), ("cat", SVDiffConfig())):
        for parameter in add_training_adapter(models, config, name):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    for model in models.values():
        model.requires_grad_(False)
    set_adapters(pipe, {})
    return pipe


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return with_adapters(FAMILIES[request.param]())


@pytest.fixture
def sd1() -> DiffusionPipeline:
    return with_adapters(tiny_pipeline())


def latents(pipe: DiffusionPipeline, prompt: str = "a dog", *, steps: int = 2, **kwargs: Any) -> Tensor:
    """What the pipeline draws, before it is decoded; of Flux in rows and columns."""
    result: Tensor = pipe(
        prompt,
        height=16,
        width=32,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **kwargs,
    ).images
    if result.ndim == 3:  # of packed patches, as Flux has: twice as many columns as rows
        return result.unflatten(1, (round((result.shape[1] / 2) ** 0.5), -1)).movedim(-1, 1)
    return result


def drawn(pipe: DiffusionPipeline, uses: dict[str, AdapterUse], prompt: str = "a dog", **kwargs: Any) -> Tensor:
    with acting_adapters(pipe, uses):
        return latents(pipe, prompt, **kwargs)


def test_a_region_of_everything_is_the_adapter_everywhere(pipe: DiffusionPipeline) -> None:
    everywhere = drawn(pipe, {"dog": AdapterUse(0.8, ALWAYS)})
    assert torch.equal(drawn(pipe, {"dog": AdapterUse(0.8, region=Region((0.0, 0.0, 1.0, 1.0)))}), everywhere)
    plain = drawn(pipe, {"dog": AdapterUse(0.8)})
    assert close(everywhere, plain)
    assert not close(latents_of_base(pipe), plain, 1e-2)


def latents_of_base(pipe: DiffusionPipeline) -> Tensor:
    set_adapters(pipe, {})
    return latents(pipe)


def test_each_half_is_predicted_by_its_own_adapter_and_prompt(pipe: DiffusionPipeline) -> None:
    left, right = Region(LEFT.box, prompt="a big dog"), Region(RIGHT.box, prompt="two cats")
    dog = drawn(pipe, {"dog": AdapterUse(1.0, ALWAYS)}, "a big dog", steps=1)
    cat = drawn(pipe, {"cat": AdapterUse(0.5, ALWAYS)}, "two cats", steps=1)
    both = drawn(pipe, {"dog": AdapterUse(1.0, region=left), "cat": AdapterUse(0.5, region=right)}, "animals", steps=1)
    half = both.shape[-1] // 2
    assert torch.equal(both[..., :half], dog[..., :half])
    assert torch.equal(both[..., half:], cat[..., half:])
    assert not close(dog, cat, 1e-3)


def test_outside_of_all_regions_is_the_base_and_what_acts_everywhere(sd1: DiffusionPipeline) -> None:
    everywhere = drawn(sd1, {"cat": AdapterUse(0.5, ALWAYS)}, steps=1)
    both = drawn(sd1, {"dog": AdapterUse(1.0, region=LEFT), "cat": AdapterUse(0.5)}, steps=1)
    half = both.shape[-1] // 2
    assert torch.equal(both[..., half:], everywhere[..., half:])
    assert not close(both[..., :half], everywhere[..., :half], 1e-3)
    alone = drawn(sd1, {"dog": AdapterUse(1.0, region=LEFT)}, steps=1)
    set_adapters(sd1, {})
    assert torch.equal(alone[..., half:], latents(sd1, steps=1)[..., half:])


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_schedule_sets_the_weight_of_each_step(sd1: DiffusionPipeline, scheduler: Any) -> None:
    if scheduler is not None:
        sd1.scheduler = scheduler.from_config(sd1.scheduler.config)
    schedule = parse_schedule("0:0.2 1:1")
    scheduled = drawn(sd1, {"dog": AdapterUse(0.8, schedule)}, steps=4)

    def next_weight(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        timesteps = pipe.scheduler.timesteps.tolist()
        distinct = list(dict.fromkeys(timesteps))
        done = distinct.index(timesteps[min(step + 1, len(timesteps) - 1)]) / (len(distinct) - 1)
        set_adapters(pipe, {"dog": {"unet": 0.8 * schedule.factor(done), "text_encoder": 0.8}})
        return tensors

    set_adapters(sd1, {"dog": {"unet": 0.8 * 0.2, "text_encoder": 0.8}})
    expected = latents(sd1, steps=4, callback_on_step_end=next_weight)
    assert close(scheduled, expected)
    assert not close(scheduled, drawn(sd1, {"dog": AdapterUse(0.8)}, steps=4), 2.5e-2)


def test_an_adapter_that_comes_late_leaves_the_first_steps_to_the_base(sd1: DiffusionPipeline) -> None:
    late = {"dog": AdapterUse({"unet": 1.0}, parse_schedule({"from": 0.9}))}
    seen = []
    with acting_adapters(sd1, late):
        latents(sd1, steps=3, callback_on_step_end=lambda *a: seen.append(a[3]["latents"].clone()) or a[3])
    set_adapters(sd1, {})
    base = []
    latents(sd1, steps=3, callback_on_step_end=lambda *a: base.append(a[3]["latents"].clone()) or a[3])
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], base[:-1], strict=True))
    assert not torch.equal(seen[-1], base[-1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_afterwards_the_pipeline_is_as_before(pipe: DiffusionPipeline, error: type[BaseException]) -> None:
    before = latents_of_base(pipe)
    uses = {"dog": AdapterUse(1.0, ALWAYS, LEFT)}

    def stop(*_: Any) -> Any:
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"), acting_adapters(pipe, uses):
        latents(pipe, callback_on_step_end=stop)
    assert torch.equal(latents(pipe), before)
    assert "encode_prompt" not in vars(pipe)
    assert all("forward" not in vars(model) for model in components_of(pipe).values())
    layers = [layer for model in components_of(pipe).values() for layer in spectral_layers(model).values()]
    assert layers
    assert all(layer.sample_weights is None for layer in layers)


def test_adapters_that_acted_before_act_again(sd1: DiffusionPipeline) -> None:
    set_adapters(sd1, {"cat": 0.5})
    before = latents(sd1)
    drawn(sd1, {"dog": AdapterUse(1.0, ALWAYS)})
    assert torch.equal(latents(sd1), before)


def test_one_way_of_acting_at_a_time(sd1: DiffusionPipeline) -> None:
    everywhere, left = {"dog": AdapterUse(1.0)}, {"dog": AdapterUse(1.0, region=LEFT)}
    for uses in (everywhere, left):
        for outer in (acting_adapters(sd1, left), per_sample_adapters(sd1, [{"cat": 1.0}])):
            refused = pytest.raises(UserError, match="one inside of the other")
            with outer, refused, acting_adapters(sd1, uses):
                pass


def test_compiled_denoiser_acts_alike(sd1: DiffusionPipeline) -> None:
    uses = {"dog": AdapterUse(1.0, region=LEFT), "cat": AdapterUse(0.5)}
    expected = drawn(sd1, uses)
    whole = sd1.unet
    sd1.unet = torch.compile(whole, backend="eager")
    try:
        assert close(drawn(sd1, uses), expected)
    finally:
        sd1.unet = whole
        torch._dynamo.reset()


def test_a_region_of_flux_keeps_what_to_avoid() -> None:
    """Flux reads what to avoid as a prompt of its own, which is not the region's."""
    pipe = with_adapters(tiny_pipeline_flux())
    avoiding = {"negative_prompt": "two cats", "true_cfg_scale": 4.0}
    told = Region((0.0, 0.0, 1.0, 1.0), prompt="a dog")
    expected = drawn(pipe, {"dog": AdapterUse(1.0, ALWAYS)}, "a dog", **avoiding)
    with acting_adapters(pipe, {"dog": AdapterUse(1.0, region=told)}):
        for _ in range(2):
            assert torch.equal(latents(pipe, "animals", **avoiding), expected)
    assert not close(expected, drawn(pipe, {"dog": AdapterUse(1.0, ALWAYS)}, "a dog"), 1e-3)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipeline_sdxl])
def test_a_region_has_its_prompt_beside_one_that_was_read_before(make: Callable[[], DiffusionPipeline]) -> None:
    pipe = with_adapters(make())
    texts = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    read = pipe.encode_prompt(["animals"] * 2, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    uses = {"dog": AdapterUse({"unet": 1.0}, region=Region(LEFT.box, prompt="a big dog"))}
    expected = drawn(pipe, uses, ["animals"] * 2)
    assert close(drawn(pipe, uses, None, **dict(zip(texts, read, strict=False))), expected)


def test_several_pictures_in_a_batch(sd1: DiffusionPipeline) -> None:
    uses = {"dog": AdapterUse(1.0, region=LEFT), "cat": AdapterUse(0.5, region=RIGHT)}
    with acting_adapters(sd1, uses):
        result = sd1(
            ["a dog", "a cat"],
            height=32,
            width=32,
            num_images_per_prompt=2,
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
            output_type="latent",
        ).images
        one = sd1(
            "a cat",
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        ).images
    assert close(result[2:3], one)


def test_unknown_adapters_are_refused(sd1: DiffusionPipeline) -> None:
    with pytest.raises(UserError, match="no adapter 'bird'"), acting_adapters(sd1, {"bird": AdapterUse(region=LEFT)}):
        pass


def test_shares_add_up_to_one(tmp_path: Path) -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    regions = [Region(mask=tmp_path / "mask.png"), Region((0.2, 0.1, 0.9, 0.6)), RIGHT]
    found = shares(regions, 5, 13)
    assert found.shape == (4, 5, 13)
    assert torch.allclose(found.sum(dim=0), torch.ones(5, 13))
    assert (found >= 0).all()
    assert found[1, 0, 0] == 1.0  # the mask alone
    assert found[0, 4, 5] == 1.0  # nothing


@pytest.mark.parametrize("kind", ["L", "RGBA", "LA", "P", "I;16"])
def test_masks_of_every_kind(tmp_path: Path, kind: str) -> None:
    """What is transparent is no part of the region, and 16 bits are as light as 8."""
    grey = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    if kind in ("RGBA", "LA"):
        mask = Image.new(kind, (3, 1), "white")
        mask.putalpha(grey)
    elif kind == "I;16":
        mask = Image.fromarray(np.array([[0, 51 * 257, 65535]], np.uint16))
    else:
        mask = grey.convert(kind)
    mask.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [pytest.approx([0.0, 0.2, 1.0])]


def test_a_mask_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_mask(tmp_path / "none.png")
    assert str(refused.value) == f"the mask {tmp_path / 'none.png'} can't be read as a PNG picture: no such file"


def test_a_box_covers_parts_of_cells() -> None:
    covered = Region((0.25, 0.0, 0.5, 1.0)).coverage(2, 6)
    assert covered.tolist() == [[0, 0.5, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("0:0 0.5:1", {0: 0, 0.25: 0.5, 0.5: 1, 1: 1}),
        ([[0.2, 0.5], [1, -1]], {0: 0.5, 0.2: 0.5, 0.6: -0.25, 1: -1}),
        ({"ramp_in": 0.4}, {0: 0, 0.2: 0.5, 0.4: 1, 1: 1}),
        ({"ramp_out": 0.5}, {0: 1, 0.5: 1, 0.75: 0.5, 1: 0}),
        ({"from": 0.4}, {0: 0, 0.39: 0, 0.4: 1, 1: 1}),
        ({"until": 0.6}, {0: 1, 0.59: 1, 0.6: 0, 1: 0}),
        ({"until": 1}, {0: 1, 1: 1}),
        ({"ramp_out": 0}, {0: 1, 1: 1}),
        ({"ramp_in": 0}, {0: 1, 1: 1}),
    ],
)
def test_factors_of_schedules(schedule: object, values: dict[float, float]) -> None:
    parsed = parse_schedule(schedule)
    assert {done: pytest.approx(parsed.factor(done)) for done in values} == values
    assert parse_schedule(str(parsed)) == parsed


@pytest.mark.parametrize(
    "wrong", ["", "0", "0:1:2", "a:1", "0:nan", "0.5:1 0:1", "2:1", {"ramp": 0.3}, {"ramp_in": True}, 0.5, None, [[0]]]
)
def test_what_is_no_schedule_is_refused(wrong: object) -> None:
    with pytest.raises(UserError, match="schedule"):
        parse_schedule(wrong)


def test_part_done_counts_distinct_timesteps() -> None:
    timesteps = torch.tensor([999.0, 750.0, 750.0, 500.0, 500.0, 1.0])
    assert [part_done(timesteps, float(step)) for step in timesteps] == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]
    assert part_done(timesteps, 748.0) == 1 / 3  # rounded to bfloat16
    assert part_done(torch.tensor([999]), 999.0) == 0
    assert [part_done(timesteps.flip(0), float(step)) for step in timesteps] == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]


@pytest.mark.parametrize(
    "value",
    [
        0.8,
        {"unet": 0.5, "text_encoder": 0.0},
        {"unet": {"down_blocks": 0.5, "": 1.0}},
        {"weight": -0.5, "schedule": "0.0:0.0 0.3:1.0"},
        {"weight": {"unet": 1.0}, "region": {"box": [0.0, 0.0, 0.5, 1.0], "prompt": "a dog"}},
        {"weight": 1.0, "region": {"mask": "left.png"}},
    ],
)
def test_uses_survive_json(value: object) -> None:
    assert use_to_json(parse_use(value)) == value


def test_a_picture_names_no_folder_of_a_mask(tmp_path: Path) -> None:
    mask = tmp_path / "left.png"
    Image.new("L", (4, 4), 255).save(mask)
    told = json.dumps(use_in_picture(AdapterUse(0.8, region=Region(mask=mask))))
    assert "left.png" in told
    assert tmp_path.name not in told
    Image.new("L", (4, 4), 254).save(mask)
    assert json.dumps(use_in_picture(AdapterUse(0.8, region=Region(mask=mask)))) != told


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("much", "a weight must be a number"),
        (float("nan"), "a weight must be a number"),
        (True, "a weight must be a number"),
        ({"vae": 1.0}, "no component 'vae'"),
        ({"te": 1.0, "text_encoder": 0.5}, "two weights"),
        ({"weight": 1.0, "regoin": [0, 0, 1, 1]}, "no 'regoin'"),
        ({"region": [0, 0, 1]}, "a region is"),
        ({"region": [0.5, 0, 0.2, 1]}, "left < right"),
        ({"region": {"box": [0, 0, 1, 1], "mask": "a.png"}}, "a region is"),
        ({"region": {"boxes": 1}}, "no 'boxes'"),
    ],
)
def test_what_is_no_use_is_refused(value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_use(value)


def test_tags_leave_the_prompt() -> None:
    assert split_prompt("a dog  here") == ("a dog  here", {})
    assert split_prompt("a <adapter:my dog:0.8> dog<adapter:cat>") == ("a dog", {"my dog": 0.8, "cat": 1.0})
    found = split_prompt("<ADAPTER:dog:unet=0.5,te=-0.2> a <3 lora:x:1>")
    assert found == ("a <3 lora:x:1>", {"dog": {"unet": 0.5, "text_encoder": -0.2}})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("<adapter:dog:0.5:0.2>", "tools disagree"),
        ("<adapter:dog:0.5,0.2>", "tools disagree"),
        ("<adapter::1>", "name is missing"),
        ("<adapter:dog:much>", "'much' is not a number"),
        ("<adapter:dog:inf>", "finite"),
        ("<adapter:dog:vae=1>", "no component 'vae'"),
        ("<adapter:dog:1> <adapter:dog:2>", "twice"),
        ("a dog <adapter:dog", "<adapter:dog: a tag has no end; write <adapter:dog:0.8>"),
        ("<Adapter:dog:1 <adapter:cat:1> here", "<Adapter:dog:1 .*here: a tag has no end"),
        ("a dog <lora:my dog:0.7>", "<lora:my dog:0.7>: adapters are named as in <adapter:dog:0.8>"),
        ("<Lyco:dog>", "<Lyco:dog>: adapters are named"),
        ("<adapter:dog:>", "the weight after the last colon is missing"),
        ("<adapter:dog: >", "the weight after the last colon is missing"),
    ],
)
def test_wrong_tags_are_refused(prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        split_prompt(prompt)


@pytest.mark.parametrize(
    "piece", ["<adapter:", "<lora:", "<", "<adapter:a:1> ", "<adapter:a:unet=1,", ":", "<adapter:<adapter:x>"]
)
def test_a_hostile_prompt_takes_no_time(piece: str) -> None:
    prompt = (piece * 100_000)[:100_000]
    begun = time.process_time()
    with contextlib.suppress(UserError):
        split_prompt(prompt)
    assert time.process_time() - begun < 0.05


def test_the_package_offers_what_acts() -> None:
    assert svft_diffusion.acting_adapters is acting_adapters
    assert svft_diffusion.Region is Region
    with pytest.raises(AttributeError):
        svft_diffusion.acting_adapter  # type: ignore[attr-defined] # noqa: B018
