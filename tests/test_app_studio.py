"""The studio: what is drawn, for whom, and how it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image

from svft_diffusion import SVDiffConfig, load_adapter, save_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.injection import adapters_of
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.drawing.background import Listener, events_of
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, Step
from svft_diffusion.app.drawing.studio import Studio
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, check_adapter
from svft_diffusion.sampling.png import read_png_settings
from svft_diffusion.sampling.sample import SamplingConfig, open_pipeline, sample

STEPS = 2
Chosen = tuple[tuple[CheckedAdapter, AdapterWeight], ...]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("pictures")
    return Studio(folder, device=torch.device("cpu"))


def chosen(models: ModelsOnDisk, **weights: AdapterWeight) -> Chosen:
    """The adapters of the first base at these weights, in this order."""
    files = {"dog": models.dog, "style": models.style}
    return tuple((check_adapter(files[name], str(models.base), name=name), weight) for name, weight in weights.items())


def asked(models: ModelsOnDisk, **fields: Any) -> PictureRequest:
    """A request for two pictures of the first base."""
    defaults: dict[str, Any] = {
        "prompt": "a photo of sks dog",
        "seed": 5,
        "num_images": 2,
        "num_inference_steps": STEPS,
    }
    return PictureRequest(**({"base": str(models.base)} | defaults | fields))


def pixels(pictures: list[SavedPicture]) -> list[bytes]:
    found = []
    for picture in pictures:
        with Image.open(picture.path) as image:
            found.append(image.tobytes())
    return found


def from_command_line(models: ModelsOnDisk, output_dir: Path, *adapters: str, **fields: Any) -> list[bytes]:
    """Pixels of the same pictures from the sampler of the command line."""
    result = sample(
        SamplingConfig(
            pretrained_model_name_or_path=str(models.base),
            adapter=list(adapters),
            prompt=["a photo of sks dog"],
            seed=[5],
            num_images=2,
            num_inference_steps=[STEPS],
            output_dir=output_dir,
            device="cpu",
            **fields,
        )
    )
    return [Image.open(path).tobytes() for path in result.pictures]


def test_pictures_equal_those_of_the_command_line(models: ModelsOnDisk, studio: Studio, tmp_path: Path) -> None:
    base = from_command_line(models, tmp_path / "base")
    blend = from_command_line(models, tmp_path / "blend", f"{models.style}:-0.5", f"{models.dog}:0.8")
    parts = from_command_line(models, tmp_path / "parts", f"{models.dog}:unet=0.5,te=0.25")
    assert len({str(one) for one in (base, blend, parts)}) == 3

    def drawn(**weights: AdapterWeight) -> list[bytes]:
        return pixels(studio.generate_pictures(asked(models, adapters=chosen(models, **weights))))

    assert drawn() == base
    assert drawn(style=-0.5, dog=0.8) == blend
    assert drawn(style=0.0, dog=0.0) == base
    assert drawn(dog={"unet": 0.5, "text_encoder": 0.25}) == parts
    assert drawn(dog=2.0) not in (base, blend)
    assert drawn(style=-0.5, dog=0.8) == blend
    assert drawn() == base


def test_size_and_scheduler_are_those_asked_for(models: ModelsOnDisk, studio: Studio, tmp_path: Path) -> None:
    options = {"width": 24, "height": 16}
    wide = from_command_line(models, tmp_path, scheduler=["euler_a"], **options)
    request = asked(models, scheduler="Euler a", **options)
    saved = studio.generate_pictures(request)
    assert pixels(saved) == wide
    settings = read_png_settings(saved[0].path)
    assert (settings["width"], settings["height"]) == (24, 16)
    assert (settings["scheduler_option"], settings["scheduler"]) == ("euler_a", "EulerAncestralDiscrete")
    own = studio.generate_pictures(asked(models))
    assert "scheduler_option" not in read_png_settings(own[0].path)
    assert read_png_settings(own[0].path)["scheduler"] == "DPMSolverMultistep"


def test_a_picture_can_be_drawn_again_from_its_file(models: ModelsOnDisk, studio: Studio) -> None:
    weights: AdapterWeight = {"unet": {"up_blocks": 0.5}, "text_encoder": 1.0}
    request = asked(
        models,
        adapters=chosen(models, dog=weights, style=0.25),
        negative_prompt="red",
        scheduler="ddim",
        width=24,
        num_images=1,
    )
    (first,) = studio.generate_pictures(request)
    told = read_png_settings(first.path)
    named = {adapter["name"]: adapter["weight"] for adapter in told["adapters"]}
    assert named == {"dog": weights, "style": 0.25}
    fields = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height")
    again = PictureRequest(
        base=str(models.base),
        adapters=chosen(models, **named),
        scheduler=told["scheduler_option"],
        **{name: told[name] for name in fields},
    )
    assert pixels(studio.generate_pictures(again)) == pixels([first])


def test_previews_change_nothing_and_come_with_every_step(models: ModelsOnDisk, studio: Studio) -> None:
    request = asked(models, adapters=chosen(models, dog=0.8), num_inference_steps=3)
    plain = list(studio.draw(request))
    shown = list(studio.draw(request, previews=True))
    assert pixels([one for one in plain if isinstance(one, SavedPicture)]) == pixels(
        [one for one in shown if isinstance(one, SavedPicture)]
    )
    steps = [one for one in shown if isinstance(one, Step)]
    assert [(one.picture, one.step) for one in steps] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert all(one.preview is not None and one.preview.width >= 8 for one in steps)
    assert all(one.preview is None for one in plain if isinstance(one, Step))
    assert [type(one) for one in shown] == 2 * [Step, Step, Step, SavedPicture]
    assert [one.seed for one in shown if isinstance(one, SavedPicture)] == [5, 6]


def test_closing_ends_the_drawing_within_a_step(models: ModelsOnDisk, studio: Studio) -> None:
    before = set(studio.output_dir.iterdir())
    steps_done: list[int] = []
    request = asked(models, num_inference_steps=500)
    events = studio.draw(request, previews=True)
    event = next(events)
    assert isinstance(event, Step) and event.step == 1
    started = time.perf_counter()
    events.close()
    assert time.perf_counter() - started < 2
    assert not any(thread.name == "drawing" for thread in threading.enumerate())
    assert set(studio.output_dir.iterdir()) == before
    whole = studio.generate_pictures(asked(models), lambda picture, step: steps_done.append(step))
    assert len(whole) == 2 and steps_done == [1, 2, 1, 2]
    assert pixels(whole) == pixels(studio.generate_pictures(asked(models)))


def test_waiting_visitors_can_leave(models: ModelsOnDisk, studio: Studio) -> None:
    with studio.with_adapters(str(models.base), ()):
        events = studio.draw(asked(models))
        waiting = threading.Thread(target=lambda: next(events, None))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()  # nothing is drawn while somebody else holds the pipeline
    waiting.join(30)
    assert not waiting.is_alive()
    events.close()

    left = threading.Event()

    def work(listener: Listener[int]) -> None:
        listener.tell(1)
        try:
            with listener.holding(lock):
                pass
        finally:
            left.set()

    lock = threading.Lock()
    with lock:
        numbers = events_of(work)
        assert next(numbers) == 1
        numbers.close()
        assert left.is_set()
    assert lock.acquire(blocking=False)


def test_visitors_at_the_same_time_get_their_own_pictures(models: ModelsOnDisk, studio: Studio) -> None:
    requests = [asked(models, adapters=chosen(models, dog=0.8)), asked(models), asked(models, scheduler="ddim")]
    alone = [pixels(studio.generate_pictures(request)) for request in requests]
    assert len({str(one) for one in alone}) == 3
    results: dict[int, list[bytes]] = {}

    def visit(number: int) -> None:
        results[number] = pixels(studio.generate_pictures(requests[number % 3]))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(6)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    assert [results[number] for number in range(6)] == alone + alone


def test_a_thousand_weight_changes_leave_the_base_alone(models: ModelsOnDisk, studio: Studio) -> None:
    both = [adapter for adapter, _ in chosen(models, dog=1.0, style=1.0)]
    base = pixels(studio.generate_pictures(asked(models)))
    first = pixels(studio.generate_pictures(asked(models, adapters=((both[0], 0.7), (both[1], -0.2)))))
    before = _digest(studio, models)
    chance = random.Random(0)
    for _ in range(1000):
        adapters: list[tuple[CheckedAdapter, AdapterWeight]] = []
        for adapter in chance.sample(both, chance.randint(0, 2)):
            number = chance.uniform(-10, 10)
            parts = {"unet": {"up_blocks": number, "": chance.uniform(-1, 1)}, "text_encoder": chance.uniform(-1, 1)}
            adapters.append((adapter, chance.choice([number, 0.0, parts])))
        with studio.with_adapters(str(models.base), adapters):
            pass
    assert _digest(studio, models) == before
    assert pixels(studio.generate_pictures(asked(models))) == base
    assert pixels(studio.generate_pictures(asked(models, adapters=((both[0], 0.7), (both[1], -0.2))))) == first


def _digest(studio: Studio, models: ModelsOnDisk) -> str:
    """Of the base's weights, as they are in memory with no adapter acting."""
    digest = hashlib.sha256()
    with studio.with_adapters(str(models.base), ()) as pipeline:
        fresh = open_pipeline(str(models.base), device=torch.device("cpu"))
        for component in ("unet", "text_encoder", "vae"):
            state = getattr(pipeline, component).state_dict()
            wanted = getattr(fresh, component).state_dict()
            held = {name.replace("base_layer.", ""): tensor for name, tensor in state.items()}
            for name in wanted:
                assert torch.equal(held[name], wanted[name])
                digest.update(held[name].numpy().tobytes())
    return digest.hexdigest()


def test_adapters_stay_loaded_for_a_while(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(pipe: object, file: Path, name: str, **options: Any) -> str:
        loaded.append(name)
        return load_adapter(pipe, file, name, **options)

    monkeypatch.setattr("svft_diffusion.app.drawing.open_base.load_adapter", counted)
    studio = Studio(tmp_path, device=torch.device("cpu"))
    for weights in ({"dog": 1.0}, {}, {"style": 1.0}, {"dog": 0.5, "style": 1.0}, {}, {"dog": 0.2}):
        with studio.with_adapters(str(models.base), chosen(models, **weights)):
            pass
    assert len(loaded) == 2
    monkeypatch.setattr("svft_diffusion.app.drawing.open_base.MOST_KEPT", 1)
    many = _copies(models, tmp_path / "copies", 3)
    for adapter in many:
        with studio.with_adapters(str(models.base), ((adapter, 1.0),)) as pipeline:
            assert len(adapters_of(pipeline.unet)) <= 2


def _copies(models: ModelsOnDisk, folder: Path, count: int) -> list[CheckedAdapter]:
    """Adapters that differ in their title alone."""
    pipe = open_pipeline(str(models.base), device=torch.device("cpu"))
    add_training_adapter(pipe, SVDiffConfig(targets="attention"), "new")
    found = []
    for number in range(count):
        file = folder / f"{number}.safetensors"
        save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name="tiny", title=str(number)))
        found.append(check_adapter(file, str(models.base), name=f"copy-{number}"))
    return found


def test_a_learned_token_leaves_with_its_adapter(models: ModelsOnDisk, studio: Studio) -> None:
    with studio.with_adapters(str(models.base), chosen(models, dog=1.0)) as pipeline:
        kept = adapters_of(pipeline.unet)
    assert len(kept) >= 1
    with studio.with_adapters(str(models.base), ()) as pipeline:
        assert adapters_of(pipeline.unet) == kept
    (dog, _), *_ = chosen(models, dog=1.0)
    with_token = dataclasses.replace(dog, header=dataclasses.replace(dog.header, tokens={"text_encoder": ["<sks>"]}))
    with studio.with_adapters(str(models.base), ((with_token, 1.0),)) as pipeline:
        pass
    with studio.with_adapters(str(models.base), ()) as pipeline:
        assert f"sha256-{dog.sha256}" not in adapters_of(pipeline.unet)


def test_requests_that_cannot_work_say_why(models: ModelsOnDisk, studio: Studio, tmp_path: Path) -> None:
    twice = chosen(models, dog=1.0) * 2
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "  "}, "write a prompt first"),
        ({"num_images": 17}, "between 1 and 16"),
        ({"seed": -1}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"width": 20}, "width must be a multiple of 8"),
        ({"height": 8192}, "between 8 and 4096"),
        ({"scheduler": "eulr"}, "unknown scheduler 'eulr'"),
        ({"scheduler": "flow_match"}, "can't draw with this base model"),
        ({"adapters": twice}, "dog and dog are the same adapter"),
        ({"base": str(tmp_path / "nowhere")}, "no such base model folder"),
    ]
    for fields, reason in cases:
        with pytest.raises(UserError, match=reason):
            studio.generate_pictures(asked(models, **fields))
    assert len(studio.generate_pictures(asked(models))) == 2


def test_a_file_that_changes_is_not_used(models: ModelsOnDisk, tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    file.write_bytes(models.dog.read_bytes())
    adapter = check_adapter(file, str(models.base), name="dog")
    file.write_bytes(models.style.read_bytes())
    studio = Studio(tmp_path / "pictures", device=torch.device("cpu"))
    with pytest.raises(UserError, match="the file of dog has changed"):
        studio.generate_pictures(asked(models, adapters=((adapter, 1.0),)))


def test_another_base_and_back(models: ModelsOnDisk, studio: Studio) -> None:
    first = pixels(studio.generate_pictures(asked(models, adapters=chosen(models, dog=1.0))))
    other_base = str(models.other_base)
    foreign = check_adapter(models.foreign, other_base, name="foreign")
    other = pixels(studio.generate_pictures(asked(models, base=other_base)))
    with_foreign = pixels(studio.generate_pictures(asked(models, base=other_base, adapters=((foreign, 1.0),))))
    assert len({str(one) for one in (first, other, with_foreign)}) == 3
    assert pixels(studio.generate_pictures(asked(models, adapters=chosen(models, dog=1.0)))) == first


def test_a_base_that_is_not_there_leaves_the_loaded_one(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(base: str, **options: Any) -> Any:
        opened.append(base)
        return open_pipeline(base, **options)

    monkeypatch.setattr("svft_diffusion.app.drawing.studio.open_pipeline", counted)
    studio = Studio(tmp_path, device=torch.device("cpu"))
    assert studio.open_base(str(models.base)) == 16
    with pytest.raises(UserError, match="no such base model folder"):
        studio.open_base(str(tmp_path / "nowhere"))
    studio.open_base(str(models.base))
    assert opened == [str(models.base)]


@pytest.mark.parametrize("on_mismatch", ["align", "force"])
def test_adapters_of_another_base_come_in_when_told(
    models: ModelsOnDisk, tmp_path: Path, on_mismatch: OnMismatch
) -> None:
    studio = Studio(tmp_path, device=torch.device("cpu"), on_mismatch=on_mismatch)
    foreign = check_adapter(models.foreign, str(models.base), name="foreign", on_mismatch=on_mismatch)
    request = asked(models, adapters=((foreign, 1.0),), num_images=1)
    if on_mismatch == "align":  # nothing is left of it on an unrelated base
        with pytest.raises(UserError, match="nothing is left"):
            studio.generate_pictures(request)
        return
    forced = studio.generate_pictures(request)
    base = studio.generate_pictures(dataclasses.replace(request, adapters=()))
    assert pixels(forced) != pixels(base)


def test_pictures_are_kept_with_their_settings(models: ModelsOnDisk, studio: Studio) -> None:
    before = set(studio.output_dir.iterdir())
    request = asked(models, prompt="a red robot", adapters=chosen(models, dog=-1.0), num_images=1)
    (saved,) = studio.generate_pictures(request)
    assert set(studio.output_dir.iterdir()) - before == {saved.path}
    assert saved.path.name.endswith("_a-red-robot_seed5.png")
    settings = read_png_settings(saved.path)
    assert settings["prompt"] == "a red robot" and settings["seed"] == 5 and settings["base"] == "base"
    assert [(adapter["name"], adapter["weight"]) for adapter in settings["adapters"]] == [("dog", -1.0)]
