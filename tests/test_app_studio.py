"""The studio: what is drawn, for whom, and how it ends."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image

from svft_diffusion import SVDiffConfig, SVFTConfig, load_adapter, save_adapter
from svft_diffusion.adapters import add_training_adapter, unload_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.injection import adapters_of
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.drawing.background import Listener, Waiting, end_all, events_of
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, Step
from svft_diffusion.app.drawing.studio import Drawing, Studio
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, check_adapter
from svft_diffusion.sampling.png import read_png_settings, save_png
from svft_diffusion.sampling.sample import SamplingConfig, open_pipeline, sample

STEPS = 2
Chosen = tuple[tuple[CheckedAdapter, AdapterWeight], ...]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("pictures"), device=torch.device("cpu"))


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
    shown = [one for one in studio.draw(request, previews=True) if not isinstance(one, Waiting)]
    assert pixels([one for one in plain if isinstance(one, SavedPicture)]) == pixels(
        [one for one in shown if isinstance(one, SavedPicture)]
    )
    steps = [one for one in shown if isinstance(one, Step)]
    assert [(one.picture, one.step) for one in steps] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert all(one.preview is not None and one.preview.width >= 8 for one in steps)
    assert all(one.preview is None for one in plain if isinstance(one, Step))
    assert [type(one) for one in shown] == 2 * [Step, Step, Step, SavedPicture]
    assert [one.seed for one in shown if isinstance(one, SavedPicture)] == [5, 6]


def first_step(events: Drawing) -> Step:
    return next(event for event in events if isinstance(event, Step))


def test_closing_ends_the_drawing_within_a_step(models: ModelsOnDisk, studio: Studio) -> None:
    before = set(studio.output_dir.iterdir())
    steps_done: list[int] = []
    request = asked(models, num_inference_steps=500)
    events = studio.draw(request, previews=True)
    assert first_step(events).step == 1
    events.close()
    for thread in threading.enumerate():
        if thread.name == "drawing":
            thread.join(2)
            assert not thread.is_alive()
    assert set(studio.output_dir.iterdir()) == before
    whole = studio.generate_pictures(asked(models), lambda picture, step: steps_done.append(step))
    assert len(whole) == 2 and steps_done == [1, 2, 1, 2]
    assert pixels(whole) == pixels(studio.generate_pictures(asked(models)))


def test_waiting_visitors_can_leave(models: ModelsOnDisk, studio: Studio) -> None:
    with studio.with_adapters(str(models.base), ()):
        events = studio.draw(asked(models))
        waiting = threading.Thread(target=first_step, args=(events,))
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
        assert left.wait(2)
    assert lock.acquire(blocking=False)


def test_leaving_takes_no_time_however_slow_a_step_is(
    models: ModelsOnDisk, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Web servers close iterators where they answer everybody."""
    studio.open_base(str(models.base))
    go_on = threading.Event()
    monkeypatch.setattr("svft_diffusion.app.drawing.studio.generate_batch", lambda *_, **__: go_on.wait(10))
    events = studio.draw(asked(models))
    try:
        started = time.perf_counter()
        assert next(events) == Waiting()
        events.close()
        assert time.perf_counter() - started < 2
    finally:
        go_on.set()


def test_what_is_drawn_ends_with_the_program() -> None:
    """A thread that is in torch when Python ends takes it down with an abort."""
    left = threading.Event()

    def work(listener: Listener[int]) -> None:
        try:
            while True:
                listener.tell(1)
                time.sleep(0.01)
        finally:
            left.set()

    events = events_of(work)
    assert next(events) == 1
    end_all()
    assert left.is_set()


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
        ({"num_inference_steps": 0}, "the number of steps must be"),
        ({"width": 20}, "width must be a multiple of 8"),
        ({"height": 8192}, "between 8 and 4096"),
        ({"width": 72}, "at most 64 pixels a side here, 4 times its own 16; got 72 x 16"),
        ({"scheduler": "lcm", "num_inference_steps": 51}, "LCM takes at most 50 steps, got 51"),
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


def test_two_apps_on_one_folder_overwrite_nothing(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Studio(tmp_path, device=torch.device("cpu")) for _ in range(2))
    seconds: list[SavedPicture] = []

    def save_meanwhile(*arguments: Any) -> Path:
        monkeypatch.setattr("svft_diffusion.app.drawing.studio.save_png", save_png)
        seconds.extend(other.generate_pictures(asked(models, num_images=1, adapters=chosen(models, dog=1.0))))
        return save_png(*arguments)

    monkeypatch.setattr("svft_diffusion.app.drawing.studio.save_png", save_meanwhile)
    (first,) = one.generate_pictures(asked(models, num_images=1))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "00001_a-photo-of-sks-dog_seed5.png",
        "00002_a-photo-of-sks-dog_seed5.png",
    ]
    assert read_png_settings(first.path)["adapters"] == []
    assert len(read_png_settings(seconds[0].path)["adapters"]) == 1


def test_what_cannot_be_saved_leaves_nothing_and_tells_no_folder(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: object, file: Path, *_: object) -> Path:
        raise UserError(f"can't write {file}: no space left")

    folder = tmp_path / "pictures"
    studio = Studio(folder, device=torch.device("cpu"))
    monkeypatch.setattr("svft_diffusion.app.drawing.studio.save_png", fail)
    with pytest.raises(UserError, match=r"can't write 00001_a-photo-of-sks-dog_seed5\.png: no space") as caught:
        studio.generate_pictures(asked(models))
    assert str(tmp_path) not in str(caught.value) and list(folder.iterdir()) == []
    folder.rmdir()
    folder.touch()
    with pytest.raises(UserError, match="can't write to the folder of the pictures") as caught:
        studio.generate_pictures(asked(models))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "problem",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_a_lack_of_memory_is_told_with_what_helps(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    studio = Studio(tmp_path, device=torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr("svft_diffusion.app.drawing.studio.generate_batch", fail)
        with pytest.raises(UserError, match="not enough memory for a picture of 64 x 16 pixels; ask for a smaller"):
            studio.generate_pictures(asked(models, width=64, height=16))
        patched.setattr("svft_diffusion.app.drawing.studio.open_pipeline", fail)
        with pytest.raises(UserError, match="not enough memory for this base model"):
            studio.open_base(str(models.other_base))
    assert len(studio.generate_pictures(asked(models))) == 2


def test_what_the_safety_checker_hides_is_told(models: ModelsOnDisk, studio: Studio) -> None:
    with studio.with_adapters(str(models.base), ()) as pipeline:
        shown = type(pipeline).run_safety_checker
        pipeline.run_safety_checker = lambda image, *_: (torch.zeros_like(image), [True])
    try:
        hidden = studio.generate_pictures(asked(models))
    finally:
        del pipeline.run_safety_checker
    assert pipeline.run_safety_checker.__func__ is shown
    assert [picture.blacked_out for picture in hidden] == [True, True]
    assert read_png_settings(hidden[0].path)["blacked_out"] is True
    seen = studio.generate_pictures(asked(models))
    assert [picture.blacked_out for picture in seen] == [False, False]
    assert "blacked_out" not in read_png_settings(seen[0].path)


def test_drawing_starts_at_once_after_weights_have_changed(tmp_path: Path) -> None:
    """On the embedded model, with adapters that are loaded: within 100 ms from the request to the first step."""
    pipe = open_pipeline("toybox", device=torch.device("cpu"))
    adapters = []
    for number, config in enumerate((SVDiffConfig(targets="attention"), SVFTConfig(targets="attention"))):
        for values in add_training_adapter(pipe, config, "new"):
            values.data.fill_(0.01)
        file = tmp_path / f"{number}.safetensors"
        save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name="toybox"))
        unload_adapter(pipe, "new")
        adapters.append(check_adapter(file, "toybox", name=file.stem))
    studio = Studio(tmp_path / "pictures", device=torch.device("cpu"))
    begun: list[tuple[float, float]] = []
    with studio.with_adapters("toybox", [(adapter, 1.0) for adapter in adapters]) as pipeline:
        pipeline.unet.register_forward_pre_hook(lambda *_: begun.append((time.process_time(), time.perf_counter())))
    worked, waited = [], []
    for attempt in range(6):
        weighted = tuple((adapter, 0.1 * number + 0.01 * attempt) for number, adapter in enumerate(adapters, 1))
        studio.open_base("toybox")  # when the drawing before has ended
        begun.clear()
        started = time.process_time(), time.perf_counter()
        events = studio.draw(PictureRequest("toybox", "a photo of sks robot", weighted), previews=True)
        first_step(events)
        events.close()
        worked.append(begun[0][0] - started[0])
        waited.append(begun[0][1] - started[1])
    # Other programs take their part of the machine, but not of the first clock.
    assert min(worked) < 0.1 and min(waited) < 0.5, (worked, waited)
