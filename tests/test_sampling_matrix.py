"""What a run draws: axes, prompts from files, sets of adapters, schedulers, and input that can't work."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from tiny_transformers import tiny_pipeline_sd3

from svft_diffusion import load_adapter
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling import drawing
from svft_diffusion.sampling.acting import acting_adapters
from svft_diffusion.sampling.adapter_sets import AdapterEntry, AdapterSets, check_sets
from svft_diffusion.sampling.adapter_use import parse_use
from svft_diffusion.sampling.matrix import read_matrix
from svft_diffusion.sampling.plan import PlannedRow, plan_rows, read_prompt_rows
from svft_diffusion.sampling.png import read_png_settings
from svft_diffusion.sampling.prompt_files import PROMPT_LISTS, PromptRow, SubjectWords, fill_in, read_prompts
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.sampling.sample import SamplingConfig, generate, sample
from svft_diffusion.sampling.schedulers import SCHEDULERS, make_scheduler, scheduler_name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


def config_for(models: ModelsOnDisk, output_dir: Path | None = None, **settings: Any) -> SamplingConfig:
    given = {"num_inference_steps": 2, "device": "cpu", **settings}
    return SamplingConfig(pretrained_model_name_or_path=str(models.base), output_dir=output_dir, **given)


def both(models: ModelsOnDisk, **sets: dict[str, Any]) -> AdapterSets:
    uses = {label: {name: parse_use(use) for name, use in members.items()} for label, members in sets.items()}
    return AdapterSets([AdapterEntry(models.dog), AdapterEntry(models.style)], uses)


def plan(models: ModelsOnDisk, adapters: AdapterSets | None = None, **settings: Any) -> list[PlannedRow]:
    config = config_for(models, **settings)
    return plan_rows(config, read_prompt_rows(config), check_sets(adapters or both(models), str(models.base)))


def written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_every_combination_has_a_name_of_its_own(models: ModelsOnDisk) -> None:
    rows = plan(
        models,
        both(models, base={}, **{"Dog & Style": {"dog": 1, "style": {"unet": 0.5}}}),
        prompt=["a dog", "a cat"],
        weights=[0.5, 1.0],
        seed=[5, 1],
        num_images=2,
        num_inference_steps=[2, 3],
        guidance_scale=[1.0, 7.5],
        scheduler=["euler_a", "default"],
    )
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 2
    names = [picture.file_name for row in rows for picture in row.pictures]
    assert len(set(names)) == len(names) == 4 * len(rows)
    assert names[:4] == [f"000_a-dog_base_euler_a_steps2_cfg1_w0.5_seed{seed}.png" for seed in (5, 6, 1, 2)]
    assert rows[0].label == "a dog\nbase\neuler_a\n2 steps\nguidance 1\nstrength 0.5"
    last = rows[-2].pictures[0].settings
    assert "scheduler_option" not in last and rows[0].pictures[0].settings["scheduler_option"] == "euler_a"
    assert [(adapter["name"], adapter["weight"]) for adapter in last["adapters"]] == [
        ("dog", 0.5),
        ("style", {"unet": 0.25}),
    ]


def test_tags_in_prompts_give_weights(models: ModelsOnDisk) -> None:
    prompts = ["a dog <adapter:style:unet=0.5,te=0.2> here", "plain", "<adapter:dog:0> x"]
    rows = plan(models, both(models, only={"dog": {"weight": 0.8, "schedule": {"from": 0.5}}}), prompt=prompts)
    assert [row.prompt for row in rows] == ["a dog here", "plain", "x"]
    assert rows[0].uses["style"].weight == {"unet": 0.5, "text_encoder": 0.2}
    assert rows[0].uses["dog"].weight == rows[1].uses["dog"].weight == 0.8 and "style" not in rows[1].uses
    assert rows[2].uses["dog"].weight == 0 and rows[2].uses["dog"].schedule is not None


def test_prompts_that_differ_by_tags_alone_are_told_apart(models: ModelsOnDisk) -> None:
    prompts = ["a dog", "a dog <adapter:dog:0.1>", "a dog<adapter:dog:unet=1,te=-0.5> <adapter:style:2>"]
    rows = plan(models, prompt=[*prompts, "a cat <adapter:dog:0.1>"])
    assert [row.pictures[0].file_name for row in rows] == [
        "000_a-dog_seed0.png",
        "001_a-dog_dog0.1_seed0.png",
        "002_a-dog_dogunet1-text_encoder-0.5_style2_seed0.png",
        "003_a-cat_seed0.png",
    ]
    assert [row.label for row in rows] == [
        "a dog",
        "a dog\ndog 0.1",
        "a dog\ndog unet1-text_encoder-0.5, style 2",
        "a cat\ndog 0.1",
    ]


def test_strengths_are_told_with_the_weights_that_they_multiply(models: ModelsOnDisk) -> None:
    rows = plan(models, prompt=["a dog <adapter:dog:0.3>", "a dog"], weights=[0.5, 1])
    assert [row.label.partition("\n")[2] for row in rows] == [
        "strength 0.5 of dog 0.3", "strength 1 of dog 0.3", "strength 0.5", "strength 1"
    ]  # fmt: skip
    assert [row.uses["dog"].weight for row in rows] == [0.15, 0.3, 0.5, 1.0]


def test_a_placeholder_that_is_none_is_told(models: ModelsOnDisk, tmp_path: Path, capsys: Any) -> None:
    prompts = ["a {klass}", "a {token} {Class} {a b} {}", "a {klass} again"]
    sample(config_for(models, tmp_path / "out", prompt=prompts, token="sks"))
    told = [line for line in capsys.readouterr().out.splitlines() if "stays as it is" in line]
    assert told == [
        "in a prompt, {klass} stays as it is, did you mean {class}? {token} and {class} are what gets filled in",
        "in a prompt, {Class} stays as it is, did you mean {class}? {token} and {class} are what gets filled in",
    ]


def test_words_of_the_subject(models: ModelsOnDisk) -> None:
    adapters = AdapterSets([AdapterEntry(models.style), AdapterEntry(models.dog)])  # the style has no trigger
    assert plan(models, adapters, prompt=["a {token} {class}, {token}"])[0].prompt == "a sks, sks"
    words = {"token": "zwx", "class_word": "cat"}
    assert plan(models, adapters, prompt=["a {token} {class} or {class} {0} {x}"], **words)[0].prompt == (
        "a zwx cat or cat {0} {x}"
    )
    for prompt, flag in (("a {class}", "--class_word"), ("a {token}", "--token")):
        with pytest.raises(UserError, match=flag):
            fill_in(prompt, SubjectWords("sks" if "class" in prompt else None))
    assert fill_in("{token}", SubjectWords("{class}", "x")) == "{class}"


def test_lists_of_the_dreambooth_paper() -> None:
    lists = {name: [row.prompt for row in read_prompts(name)] for name in PROMPT_LISTS}
    assert [len(set(prompts)) for prompts in lists.values()] == [25, 25]
    assert len({*lists["dreambooth_object"]} & {*lists["dreambooth_live"]}) == 15
    assert all("{token} {class}" in prompt for prompts in lists.values() for prompt in prompts)
    for name in ("dreambooth_objects", "dreambooth_objct"):
        with pytest.raises(UserError, match="no such file or list, did you mean 'dreambooth_object'"):
            read_prompts(name)


def test_prompts_of_every_kind_of_file(tmp_path: Path) -> None:
    values = [
        {"prompt": 'a, "b"\nc', "negative_prompt": "x", "seed": [3], "guidance_scale": [2.5], "name": "first"},
        {"prompt": "é 日", "num_images": 2, "scheduler": ["ddim"]},
    ]
    rows = [PromptRow(**value) for value in values]
    files = [
        written(tmp_path / "a.json", json.dumps(values)),
        written(tmp_path / "a.yaml", yaml.safe_dump(values, allow_unicode=True)),
        written(tmp_path / "a.jsonl", "\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n"),
        written(
            tmp_path / "a.csv",
            "\ufeffprompt,negative_prompt,seed,guidance_scale,name,num_images,scheduler\r\n"
            '"a, ""b""\nc",x,3,2.5,first,,\r\né 日,,,,,2,ddim\r\n,,,,,,\r\n',
        ),
    ]
    for file in files:
        assert read_prompts(file) == rows
    text = written(tmp_path / "a.txt", "# heading\n\n a dog \r\n{token} # 2\n")
    assert read_prompts(text) == [PromptRow("a dog"), PromptRow("{token} # 2")]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "\n# only a comment\n", "holds no prompt"),
        ("a.json", "[]", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.csv", "text,seed\na,1\n", "one of them prompt"),
        ("a.csv", "prompt,sed\na,1\n", "line 2: unknown setting 'sed', did you mean 'seed'"),
        ("a.csv", "prompt,seed\na dog, happy,1\n", "line 2: 2 columns are named"),
        ("a.csv", "prompt,seed\n\na,one\n", "line 3: seed: expected a whole number, got 'one'"),
        ("a.csv", 'prompt\n"a', "after line 1: no CSV"),
        ("a.json", '[\n "a",\n]', "line 3: no JSON"),
        ("a.jsonl", '"a"\n\n{"prompt": }\n', "line 3: no JSON"),
        ("a.yaml", "- a\n- b: [1\n- c\n", "line 4: no YAML"),
        ("a.yaml", "prompt: a\n", "must hold a list"),
        ("a.yaml", "- 3\n", "expected a prompt, got a int"),
        ("a.yaml", "- {seed: 3}\n", "prompt 1: prompt is missing"),
        ("a.yaml", "- {prompt: a, name: ../../evil}\n", "a file's name has"),
        ("a.yaml", "- {prompt: a, name: /etc/passwd}\n", "a file's name has"),
        ("a.yaml", "- {prompt: a, name: 'C:x'}\n", "a file's name has"),
        ("a.yaml", "- {prompt: a, name: .hidden}\n", "a file's name has"),
        ("a.yaml", "- {prompt: a, scheduler: eular}\n", "did you mean 'euler'"),
        ("a.yaml", "- {prompt: a, num_images: 0}\n", "num_images must be at least 1"),
        ("a.yaml", "- {prompt: a, seed: -1}\n", "the seed must be between"),
    ],
)
def test_prompt_files_that_are_refused(
    name: str, text: str, reason: str, models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    file = written(tmp_path / name, text)
    with pytest.raises(UserError, match=reason) as caught:
        sample(config_for(models, tmp_path / "out", prompts=str(file)))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_matrix_file_is_the_flags_and_more(models: ModelsOnDisk, tmp_path: Path) -> None:
    """Its pictures are those of the library's own calls."""
    mask = tmp_path / "lists" / "left.png"
    written(tmp_path / "lists" / "p.txt", "a robot\n")
    Image.new("L", (4, 4), 255).save(mask)
    file = tmp_path / "lists" / "matrix.yaml"
    matrix = {
        "pretrained_model_name_or_path": "../base",
        "adapter": [
            {"name": "my dog", "file": "../dog.safetensors", "weight": 0.5},
            "../style.safetensors:unet=0.5",
        ],
        "adapter_sets": {
            "base": {},
            "late": {"my dog": {"weight": 1, "schedule": {"from": 0.5}}},
            "masked": {"style": {"weight": 0.5, "region": {"mask": "left.png", "prompt": "a hat"}}},
        },
        "prompt": "a dog",
        "prompts": "p.txt",
        "seed": [3, 9],
        "num_inference_steps": 2,
    }
    (tmp_path / "base").symlink_to(models.base)
    (tmp_path / "dog.safetensors").write_bytes(models.dog.read_bytes())
    (tmp_path / "style.safetensors").write_bytes(models.style.read_bytes())
    written(file, yaml.safe_dump(matrix))
    config, adapters = read_matrix(file, {"seed": [4], "output_dir": tmp_path / "out", "device": "cpu"})
    assert config.seed == [4] and [entry.name for entry in adapters.entries] == ["my dog", None]
    result = sample(config, adapters)
    assert [path.name for path in result.pictures] == [
        f"00{number}_a-{word}_{label}_seed4.png"
        for number, word in enumerate(["dog", "robot"])
        for label in ("base", "late", "masked")
    ]

    pipe = load_pipeline(str(models.base))

    def expected(prompt: str) -> bytes:
        return generate(pipe, prompt, seed=4, num_inference_steps=2).tobytes()

    assert pixels(result.pictures[0]) == expected("a dog") and pixels(result.pictures[3]) == expected("a robot")
    load_adapter(pipe, models.dog, "dog")
    load_adapter(pipe, models.style, "style")
    with acting_adapters(pipe, {"dog": adapters.sets["late"]["my dog"]}):
        late = expected("a dog")
    with acting_adapters(pipe, {"style": adapters.sets["masked"]["style"]}):
        masked = expected("a robot")
    assert pixels(result.pictures[1]) == late != pixels(result.pictures[0])
    assert pixels(result.pictures[5]) == masked != pixels(result.pictures[3])
    told = read_png_settings(result.pictures[1])["adapters"]
    assert [adapter["name"] for adapter in told] == ["my_dog"]
    assert parse_use(told[0]["weight"]) == adapters.sets["late"]["my dog"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt: [a\nseed: 1\n", "line 2: no YAML"),
        ("prompt: a\n\tseed: 1\n", "line 2: no YAML"),
        ("- a\n", "must hold settings"),
        ("promt: a\n", "unknown key 'promt', did you mean 'prompt'"),
        ("adapter_set: {}\n", "did you mean 'adapter_sets'"),
        ("output_dir: x\n", "give --output_dir to the command"),
        ("prompt: a\nseed: [one]\n", "seed: expected a whole number, got 'one'"),
        ("prompt: a\nseed: []\n", "--seed holds no value"),
        ("prompt: a\nnum_images: 200000\n", "at most 100000"),
        ("prompt: a\nseed: [1, 2]\nnum_images: 100000\n", "at most 100000"),
        ("prompt: a\nadapter: [{fil: x}]\n", "unknown key 'fil', did you mean 'file'"),
        ("prompt: a\nadapter: [{name: x}]\n", "file .and name. must be text"),
        ("prompt: a\nadapter: [{file: DOG, schedule: {ramp: 1}}]\n", "is no schedule"),
        ("prompt: a\nadapter: [{file: DOG, region: [0, 0, 0, 1]}]\n", "a box is"),
        ("prompt: a\nadapter: [{file: DOG, region: {mask: none.png}}]\n", "none.png can't be read"),
        ("prompt: a\nadapter: [{file: DOG, name: rex}]\nadapter_sets: {a: {res: 1}}\n", "'res', did you mean 'rex'"),
        ("prompt: a\nadapter: [{file: DOG, name: rex}, {file: STYLE, name: rex}]\n", "two adapters have the name"),
        ("prompt: a\nadapter: [DOG, DOG]\n", "are the same adapter"),
        ("prompt: a\nadapter: [DOG]\nadapter_sets: [1]\n", "adapter_sets must map"),
        ("prompt: a\nadapter: [DOG]\nadapter_sets: {A: {dog: 1}, a: {}}\n", "would be called"),
        ("prompt: a <adapter:dgo:1>\nadapter: [{file: DOG, name: dog}]\n", "unknown adapter 'dgo', did you mean 'dog'"),
        ("prompt: a <adapter:dog:1>\n", "give its file by --adapter"),
        ("prompt: a <adapter:dog:1:0.5>\n", "tools disagree"),
        ("prompt: <adapter:dog>\nadapter: [{file: DOG, name: dog}]\n", "tags of adapters alone"),
        ("prompt: a {token}\n", "give it by --token"),
        ("prompt: [a, a]\nscheduler: [euler, eulr]\n", "did you mean 'euler'"),
        ("prompt: a\nguidance_scale: [1.0000001, 1]\n", "too close"),
        ("prompt: a\nadapter: [DOG, FOREIGN]\n", "was trained on the base"),
        ("prompt: a\nprompts: none.txt\n", "can't read --prompts"),
        ('prompt: a\nprompts: "a\\0b"\n', "can't read --prompts"),
        ("prompt: a\nnegative_prompt:\n", "negative_prompt: expected text, got None"),
        ("prompt: a\nadapter: none.safetensors\n", "there is no adapter .*none.safetensors"),
        ("prompt: a\npretrained_vae_model_name_or_path: .\n", "holds no config.json"),
    ],
)
def test_matrix_files_that_are_refused(
    text: str,
    reason: str,
    models: ModelsOnDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(drawing, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    for word, path in (("DOG", models.dog), ("STYLE", models.style), ("FOREIGN", models.foreign)):
        text = text.replace(word, json.dumps(str(path)))
    file = written(tmp_path / "matrix.yaml", text)
    flags = ["--pretrained_model_name_or_path", str(models.base), "--output_dir", str(tmp_path / "out")]
    assert run_command("sample", ["--matrix", str(file), *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    with pytest.raises(UserError, match=reason):
        raise UserError(said)
    assert not (tmp_path / "out").exists()


def test_schedulers_by_the_names_that_people_know(models: ModelsOnDisk) -> None:
    pipe = load_pipeline(str(models.base))
    assert scheduler_name("DPM++ 2M Karras") == "dpm++_2m_karras" and scheduler_name(" Euler-a ") == "euler_a"
    assert scheduler_name("k_dpmpp_2m_sde") == "dpm++_2m_sde" and scheduler_name("euler ancestral") == "euler_a"
    with pytest.raises(UserError, match=r"'dpmpp', did you mean 'dpm\+\+_2m'\? There are default, ddim,"):
        scheduler_name("dpmpp")
    with pytest.raises(UserError, match="unknown scheduler 'zzz'; there are default"):
        scheduler_name("zzz")
    pictures = {}
    base = pipe.scheduler
    for name in SCHEDULERS:
        if name.startswith("flow"):
            with pytest.raises(UserError, match="which was made by denoising diffusion; choose from default, ddim"):
                make_scheduler(pipe, name)
            continue
        scheduler = make_scheduler(pipe, name)
        assert scheduler.config.prediction_type == base.config.prediction_type
        assert scheduler.config.beta_end == base.config.beta_end
        assert not getattr(scheduler.config, "clip_sample", False)  # of pixels, which latents are not
        pipe.scheduler = scheduler
        pictures[name] = generate(pipe, "a dog", seed=0, num_inference_steps=4).tobytes()
        assert pictures[name] == generate(pipe, "a dog", seed=0, num_inference_steps=4).tobytes()
        pipe.scheduler = base
    assert len(set(pictures.values())) >= len(pictures) - 3


def test_flow_matching_takes_schedulers_of_its_own() -> None:
    pipe = tiny_pipeline_sd3()
    assert type(make_scheduler(pipe, "flow_match_heun")).__name__ == "FlowMatchHeunDiscreteScheduler"
    assert make_scheduler(pipe, "flow_match").config.shift == pipe.scheduler.config.shift
    with pytest.raises(UserError, match="which was made by flow matching; choose from default, flow_match"):
        make_scheduler(pipe, "euler")


def test_the_scheduler_is_told_and_kept_apart(models: ModelsOnDisk, tmp_path: Path) -> None:
    result = sample(config_for(models, tmp_path, prompt=["a dog"], scheduler=["Euler a"]))
    told = read_png_settings(result.pictures[0])
    assert told["scheduler_option"] == "euler_a" and told["scheduler"] == "EulerAncestralDiscrete"
    with pytest.raises(UserError, match="is another picture"):
        sample(config_for(models, tmp_path, prompt=["a dog"]))


def test_settings_that_only_the_model_can_refuse(models: ModelsOnDisk, tmp_path: Path) -> None:
    """Nothing is drawn before the last combination is known to work."""
    wrong = {"dog": {"unet": {"no_such_block": 1.0}}}
    with pytest.raises(UserError, match="no_such_block"):
        sample(config_for(models, tmp_path / "out", prompt=["a"]), both(models, fine={"dog": 1}, wrong=wrong))
    with pytest.raises(UserError, match="flow_match can't draw"):
        sample(config_for(models, tmp_path / "out", prompt=["a"], scheduler=["default", "flow_match"]))
    assert not (tmp_path / "out").exists()


def test_a_batch_draws_what_one_by_one_draws(models: ModelsOnDisk, tmp_path: Path) -> None:
    one = sample(config_for(models, tmp_path / "one", prompt=["a"], negative_prompt="b", num_images=3))
    many = sample(config_for(models, tmp_path / "many", prompt=["a"], negative_prompt="b", num_images=3, batch_size=2))
    for first, second in zip(one.pictures, many.pictures, strict=True):
        difference = [abs(a - b) for a, b in zip(pixels(first), pixels(second), strict=True)]
        assert max(difference) <= 1


def test_index(models: ModelsOnDisk, tmp_path: Path) -> None:
    prompts = ['<script>alert("x")</script> & dogs', "=1+1, a cat"]
    result = sample(
        config_for(models, tmp_path, prompt=prompts, adapter=[str(models.dog)], weights=[0, 1], negative_prompt="<b>")
    )
    with (tmp_path / "index.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [path.name for path in result.pictures]
    assert rows[1]["prompt"] == prompts[0] and rows[1]["adapters"] == "dog: 1" and rows[2]["prompt"] == prompts[1]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "http" not in page and page.count('loading="lazy"') == 4 and page.count("<option") == 2 + 2 + 2
    assert page.count('data-prompt="1"]') == 1  # hides the figures of the other prompts


def test_large_grids_are_split(models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svft_diffusion.sampling.overview._PICTURES_OF_GRID", 4)
    prompts = ["a", "b", "c"]
    result = sample(config_for(models, tmp_path, prompt=prompts, num_images=2))
    assert [file.name for file in result.grids] == ["grid-001.png", "grid-002.png"]
    assert [len(read_png_settings(file)["pictures"]) for file in result.grids] == [4, 2]
    fewer = {"prompt": prompts[:1], "num_images": 2}
    with pytest.raises(UserError, match=r"grid-001\.png shows pictures of another run, such as 001_b_seed0\.png"):
        sample(config_for(models, tmp_path, **fewer))
    mine = tmp_path / "grid-009.png"
    Image.new("RGB", (2, 2)).save(mine)
    assert [file.name for file in sample(config_for(models, tmp_path, overwrite=True, **fewer)).grids] == ["grid.png"]
    assert not (tmp_path / "grid-001.png").exists() and mine.exists()


def test_hostile_prompts_take_no_time(models: ModelsOnDisk) -> None:
    hostile = [
        "<adapter:" * 11_000,
        "{token" * 16_000,
        "<adapter:a:" + "0" * 100_000,
        "{token} {class" * 7000,
        "-" * 100_000,
    ]
    for prompt in hostile:
        begin = time.process_time()
        try:
            plan(models, AdapterSets(), prompt=[prompt], token="t", class_word="c")
        except UserError as problem:
            assert len(str(problem)) < 300
        assert time.process_time() - begin < 0.05


_LONG = 100_000  # characters


@pytest.mark.parametrize(
    "text",
    [
        "prompt: " + "a " * (_LONG // 2),
        "prompt: '" + ":" * _LONG + "'",
        "prompt: " + "[" * _LONG,
        "prompt: " + "- " * (_LONG // 2),
        "prompt: " + "{a: " * (_LONG // 4),
        "? " + "x" * _LONG + "\n: 1",
        "prompt: a\nadapter: ['" + "a:" * (_LONG // 2) + "']",
        "prompt: a\nadapter: [{file: DOG, weight: '" + "1" * _LONG + "'}]",
        "prompt: a\nadapter: [{file: DOG, schedule: '" + "0:" * (_LONG // 2) + "'}]",
        "prompt: a\nseed: '" + "1" * _LONG + "'",
        "prompt: a\nseed: " + "1" * _LONG,
        "prompt: a\nscheduler: '" + "e-" * (_LONG // 2) + "'",
        "prompts: '" + "e-" * (_LONG // 2) + "'",
        "prompt: &a [*a]",
        "adapter: &a [x, x, x, x, x, x, x, x, x]\nprompt:\n"
        + "".join(f"- &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)),
    ],
    ids=lambda text: text[:40],
)
def test_hostile_matrix_files_take_no_time(text: str, models: ModelsOnDisk, tmp_path: Path) -> None:
    """Nor do they crash the program, or fill the terminal."""
    file = written(tmp_path / "matrix.yaml", text.replace("DOG", json.dumps(str(models.dog))))
    begin = time.process_time()
    try:
        config = read_matrix(file)[0]
        for row in read_prompt_rows(config):
            split_prompt(row.prompt)
    except UserError as problem:
        assert len(str(problem)) < 700 and "\n" not in str(problem)
    assert time.process_time() - begin < 0.05


def test_many_prompts_in_yaml(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", yaml.safe_dump([{"prompt": f"a dog {i}", "seed": i} for i in range(3000)]))
    assert len(read_prompts(file)) == 3000


def test_paths_of_a_matrix_are_tidy_and_a_missing_adapter_has_a_remedy(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "lists" / "matrix.yaml", "adapter: ../outputs/demo/adapter.safetensors:0.5\nprompt: a\n")
    wanted = tmp_path / "outputs" / "demo" / "adapter.safetensors"
    with pytest.raises(UserError, match=r"there is no adapter .*svft-diffusion demo") as caught:
        read_matrix(file)
    assert f"adapter {wanted};" in str(caught.value)
    assert read_matrix(file, {"adapter": [str(models.dog)]})[1].entries[0].file == models.dog
    written(wanted, "")
    assert read_matrix(file)[1].entries == [AdapterEntry(wanted, parse_use(0.5))]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    written(file, "adapter: ~/outputs/demo/adapter.safetensors\nprompt: a\n")
    assert read_matrix(file)[1].entries[0].file == wanted
    (tmp_path / "lists" / "toybox").mkdir()  # ./toybox would mean it
    written(file, "pretrained_model_name_or_path: toybox\nprompt: a\n")
    assert read_matrix(file)[0].pretrained_model_name_or_path == "toybox"
