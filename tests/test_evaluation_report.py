"""Reports, summaries over subjects, lists of subjects, pictures that exist: all without a base model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from svft_diffusion.cli.main import main
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.backbones import load_backbone, parse_backbone
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.evaluation.drawing import guidance_scale
from svft_diffusion.evaluation.intervals import bootstrap_interval
from svft_diffusion.evaluation.plots import draw_pareto
from svft_diffusion.evaluation.report import (
    EvaluationReport,
    ScoredRow,
    SubjectFacts,
    read_report,
    summarize,
    write_report,
)
from svft_diffusion.evaluation.report_page import page
from svft_diffusion.evaluation.scoring import PromptedPictures, Scorer, column_key
from svft_diffusion.evaluation.sheets import write_sheet
from svft_diffusion.evaluation.subjects import SubjectSource, default_list, prompts_of, read_subjects, words_of
from svft_diffusion.evaluation.toy_subjects import demonstration_subject, held_out_subjects, write_photos
from svft_diffusion.files import AdapterHeader
from svft_diffusion.models import EMBEDDED_MODEL
from svft_diffusion.sampling.png import read_png_settings, save_png
from svft_diffusion.sampling.prompt_files import SubjectWords

GUIDANCE = {"FluxPipeline": 3.5, "StableDiffusion3Pipeline": 7.0, "StableDiffusionXLPipeline": 7.5, "toybox": 4.0}
LOOKS, READS = "subject_fidelity:toy-identity", "prompt_fidelity:toy-text"


def row(subject: str, label: str, fidelity: float, prompt: float | None = 0.5, **scores: float) -> ScoredRow:
    return ScoredRow(subject, label, None, "ab" * 32, 1.0, 4, 0, {LOOKS: fidelity, READS: prompt, **scores})


def report(rows: list[ScoredRow], *kinds: str | None) -> EvaluationReport:
    names = list(dict.fromkeys(one.subject for one in rows))
    kinds = kinds or (None,) * len(names)
    return EvaluationReport(
        base="toybox",
        base_fingerprint="float16:12",
        settings={"seed": 0, "num_images": 4, "height": None},
        backbones=[{"name": "toy-identity", "weights": "sha256:12", "preprocessing": "none"}],
        titles={LOOKS: "identity(toy-identity)", READS: "prompt(toy-text)"},
        subjects=[
            SubjectFacts(name, kind, "sks", "dog", "toy", ["a sks dog"], {"1.png": "cd" * 32}, {LOOKS: 0.9})
            for name, kind in zip(names, kinds, strict=True)
        ],
        rows=rows,
        summary=summarize(rows, dict(zip(names, kinds, strict=True))) if len(names) > 1 else [],
        best={"subject": rows[0].label},
        best_rule="a rule",
        deciding=(LOOKS, READS),
        notes=["a note"],
        libraries={"torch": "2"},
        machine={"threads": "1"},
    )


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report([row("a", "x", 0.2, None), row("b", "x", 0.4)], "live", "object")
    file = write_report(written, tmp_path)
    assert read_report(tmp_path) == read_report(file) == written
    again = write_report(written, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}', "nul", "[" * 3000])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is no report of svft-diffusion evaluate"):
        read_report(tmp_path)


def test_means_count_subjects_once_and_kinds_apart() -> None:
    rows = [row("a", "x", 0.2), row("b", "x", 0.4), row("c", "x", 0.9)]
    everyone, live, objects = summarize(rows, {"a": "live", "b": "live", "c": "object"})
    assert (everyone.group, everyone.subjects, everyone.means[LOOKS]) == ("all", 3, 0.5)
    assert everyone.intervals[LOOKS] == tuple(round(end, 6) for end in bootstrap_interval([0.2, 0.4, 0.9]))
    assert (live.group, live.means[LOOKS], live.intervals[LOOKS]) == ("live", 0.3, (0.2, 0.4))
    assert (objects.means[LOOKS], objects.intervals[LOOKS]) == (0.9, None)


def test_a_column_that_a_subject_lacks_has_no_mean() -> None:
    [everyone] = summarize([row("a", "x", 0.2, None), row("b", "x", 0.4)], {"a": None, "b": None})
    assert LOOKS in everyone.means and READS not in everyone.means


def test_the_page_shows_scores_intervals_and_the_best() -> None:
    text = page(report([row("a", "x", 0.2), row("b", "x", 0.4)], "live", "object"), ["pareto.png"])
    assert "| a: x | 0.200 | 0.500 |" in text
    assert "0.300 [0.200, 0.400]" in text
    assert "**x** is the best of subject, by a rule (identity(toy-identity) and prompt(toy-text))." in text
    assert "![pareto](pareto.png)" in text and "- a note" in text
    assert "| b: real photos | 0.900 | - |" in text


def test_a_pareto_plot_is_drawn_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drift = {column_key("feature_drift", "toy-identity"): 0.1}
    drawn = report([row("subject", "$x$", 0.2, 0.6, **drift), row("subject", "y", 0.4, 0.5, **drift)])
    drawn = replace(drawn, titles=drawn.titles | dict.fromkeys(drift, "drift(toy-identity)"))
    assert draw_pareto(drawn, "subject", tmp_path / "a.png") and draw_pareto(drawn, "subject", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").width == 1210  # both panels
    unfinished_formula = replace(drawn, rows=[row("subject", "$\\frac$", 0.9), *drawn.rows])
    unfinished_formula = replace(unfinished_formula, best={"subject": "$\\frac$"})
    assert draw_pareto(unfinished_formula, "subject", tmp_path / "formula.png")
    assert not draw_pareto(replace(drawn, deciding=None), "subject", tmp_path / "c.png")


def test_a_sheet_of_many_pictures_stays_a_picture_one_can_open(tmp_path: Path) -> None:
    blue, red = Image.new("RGB", (8, 8), "blue"), Image.new("RGB", (8, 8), "red")
    drawn = PromptedPictures([blue] * 25 + [red] * 2, [None] * 25 + ["a dog"] * 2)
    write_sheet(tmp_path / "few.png", drawn, [blue] * 40)
    sheet = Image.open(tmp_path / "few.png")
    assert read_png_settings(tmp_path / "few.png") == {"rows": ["real photos", "", "", "", "a dog"]}
    assert sheet.width < 12 * 170 + 300 and 5 * 160 <= sheet.height < 6 * 170
    many = PromptedPictures([blue] * 1300, [None] * 1300)
    write_sheet(tmp_path / "many.png", many, [red])
    rows = read_png_settings(tmp_path / "many.png")["rows"]
    assert len(rows) == 101 and rows[-1] == " (and 100 more pictures)"


def test_equal_pictures_have_the_highest_scores() -> None:
    scorer = Scorer([load_backbone(parse_backbone(name)) for name in ("toy-identity", "toy-text")])
    photo = demonstration_subject().photos()[0]
    same = PromptedPictures([photo, photo], ["a robot", "a robot"])
    real = scorer.photo_features([photo, photo])
    scores = scorer.score(real, same, same, same)
    for name in ("toy-identity", "toy-text"):
        assert scores[column_key("subject_fidelity", name)] == 1
        assert scores[column_key("prior_preservation", name)] == 1
        assert scores[column_key("diversity", name)] == 0
        assert scores[column_key("feature_drift", name)] == 0
    assert scores["pixel_drift:pixels"] == 0 and scores["prompt_drift:toy-text"] == 0
    assert scorer.of_photos(real)[LOOKS] == 1
    assert set(scores) == set(scorer.titles())


def test_the_order_of_pictures_and_photos_changes_no_score() -> None:
    scorer = Scorer([load_backbone(parse_backbone("toy-text"))])
    subject, other = held_out_subjects(2)
    pictures, prompts = subject.new_views(each=2), [f"a {number % 4} toy" for number in range(12)]
    once = scorer.score(scorer.photo_features(other.photos()), PromptedPictures(pictures, list(prompts)))
    turned = PromptedPictures(pictures[::-1], prompts[::-1])
    assert scorer.score(scorer.photo_features(other.photos()[::-1]), turned) == once


def test_no_column_has_two_backbones() -> None:
    scorer = Scorer([load_backbone(parse_backbone(name)) for name in ("toy-identity", "toy-text")])
    assert all(key.split(":")[1] in title for key, title in scorer.titles().items())
    assert len(set(scorer.titles().values())) == len(scorer.titles())


def test_another_measure_of_diversity_gets_a_column_of_its_own() -> None:
    scorer = Scorer([load_backbone(parse_backbone("toy-text"))], {"lpips-alex": lambda pictures: float(len(pictures))})
    views = demonstration_subject().new_views(each=1)[:5]
    drawn = PromptedPictures(views, ["a", "a", "b", "b", "b"])
    scores = scorer.score(scorer.photo_features(views), drawn)
    assert scores["diversity:lpips-alex"] == 2.5
    assert scorer.titles()["diversity:lpips-alex"] == "DIV(lpips-alex)"


# Subjects and their words


def write_list(folder: Path, subjects: object) -> Path:
    file = folder / "subjects.yaml"
    file.write_text(subjects if isinstance(subjects, str) else yaml.safe_dump(subjects), encoding="utf-8")
    return file


def test_paths_in_a_list_are_relative_to_it(tmp_path: Path) -> None:
    listed = {"name": "dog", "instance_data_dir": "photos", "adapter": "dog.safetensors:0.8", "prompts": "mine.txt"}
    [subject] = read_subjects(write_list(tmp_path, [listed]))
    assert subject.instance_data_dir == tmp_path / "photos"
    assert subject.adapter == str(tmp_path / "dog.safetensors:0.8")
    assert subject.prompts == str(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ("- name: a\n  kind: [", "line [23]: no YAML"),
        ("{}", "must hold a list of subjects"),
        (["dog"], "subject 1: expected name"),
        ([{"name": "a", "instance_data_dir": "x", "adaptor": "y"}], "did you mean 'adapter'?"),
        ([{"name": "a", "adapter": "y"}], "subject 1: instance_data_dir is missing"),
        ([{"name": "a", "instance_data_dir": "x"}], r"subject 1 \(a\): give either adapter or pictures"),
        ([{"name": "a", "instance_data_dir": "x", "adapter": "y", "kind": "alive"}], "is not one of live, object"),
        ([{"name": n, "instance_data_dir": "x", "adapter": "y"} for n in ("a", "b", "A")], "subjects 1 and 3 have the"),
    ],
)
def test_lists_that_can_not_be_are_refused(tmp_path: Path, subjects: object, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_subjects(write_list(tmp_path, subjects))


def test_the_list_of_prompts_follows_the_subject() -> None:
    assert default_list(None, "robot", "toybox") == "toy"
    assert default_list(None, "Dog", "some/base") == "dreambooth_live"
    assert default_list(None, "backpack", "some/base") == "dreambooth_object"
    assert default_list("live", "wombat", "some/base") == "dreambooth_live"


def test_prompts_are_filled_and_judged_without_the_token(tmp_path: Path) -> None:
    source = SubjectSource("dog", [], tmp_path, prompts="dreambooth_live")
    prompts = prompts_of(source, SubjectWords("sks", "dog"), EvaluationConfig(num_prompts=3), base="some/base")
    assert prompts.with_token[0] == "a sks dog in the jungle" and len(prompts.with_token) == 3
    assert prompts.without_token[0] == "a dog in the jungle"
    with pytest.raises(UserError, match="give its class word with --class_word"):
        prompts_of(source, SubjectWords("sks dog", None), EvaluationConfig(), base="some/base")


def test_a_prompt_with_settings_of_its_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,name,seed\na dog,one,\na cat,two,5\n", encoding="utf-8")
    source = SubjectSource("dog", [], tmp_path, prompts=str(file))
    with pytest.raises(UserError, match="prompt 2: an evaluation takes the prompt alone"):
        prompts_of(source, SubjectWords("sks", "dog"), EvaluationConfig(), base="some/base")


def test_the_class_word_is_no_part_of_the_token(tmp_path: Path) -> None:
    source = SubjectSource("dog", [], tmp_path, token="sks dog", class_word="dog")
    assert words_of(source, []) == SubjectWords("sks", "dog")


# Pictures that exist


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(demonstration_subject(), tmp_path / "photos")
    return tmp_path / "photos"


def write_pictures(folder: Path, *, base: str = "toybox") -> Path:
    """Two pictures with prompts in them, one with its prompt beside it, one without, and a sheet."""
    views = demonstration_subject().new_views()[:4]
    for number in range(2):
        settings = {"prompt": "a photo of sks robot on the beach", "seed": number, "base": base}
        save_png(views[number], folder / f"{number}.png", settings)
    views[2].save(folder / "2.jpg")
    (folder / "2.txt").write_text("a photo of sks robot in the snow\n", encoding="utf-8")
    views[3].save(folder / "3.png")
    save_png(Image.new("RGB", (64, 64)), folder / "grid.png", {"pictures": ["0.png"]})
    return folder


def test_pictures_that_exist_are_scored(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "mine")
    arguments = ["evaluate", "--pictures", str(folder), "--instance_data_dir", str(photos), "--token", "sks"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [scored] = told["rows"]
    assert (scored["pictures"], scored["label"], told["base"]) == (4, "mine", "toybox")
    assert scored["scores"][LOOKS] > 0.8 and scored["scores"][READS] > 0.3
    assert scored["scores"]["diversity:toy-identity"] > 0  # of the two on the beach
    assert told["notes"] == ["subject: 1 pictures have no prompt; they count for subject fidelity alone"]
    written = tmp_path / "outputs" / "evaluation" / "001"
    assert {path.name for path in written.iterdir()} == {"report.json", "report.md", "sheet_pictures.png"}
    assert str(tmp_path) not in (written / "report.json").read_text("utf-8")

    assert main([*arguments, "--output_dir", str(written)]) == 0  # again: the same bytes
    assert json.loads((written / "report.json").read_text("utf-8")) == told
    assert main([*arguments, "--output_dir", str(written), "--backbone", "toy-text"]) == 2
    assert "report.json is of another evaluation" in capsys.readouterr().err
    assert json.loads((written / "report.json").read_text("utf-8")) == told


def test_pictures_that_can_not_be_read_are_told(tmp_path: Path, photos: Path) -> None:
    folder = write_pictures(tmp_path / "mine")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (photos / "06.jpg").write_bytes(b"no picture")
    arguments = ["evaluate", "--pictures", str(folder), "--instance_data_dir", str(photos), "--token", "sks"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    notes = read_report(tmp_path / "out").notes
    assert any(note.startswith("subject: photos that were left out: 06.jpg (") for note in notes)
    assert any(note.startswith("subject: pictures that were left out: cut.png (") for note in notes)


@pytest.mark.parametrize("name", ["report.md", "pareto.png", "sheet_pictures.png", "report.json"])
def test_files_of_others_are_not_replaced(
    name: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "mine")
    output = tmp_path / "out"
    output.mkdir()
    Image.new("RGB", (8, 8)).save(output / name, format="PNG") if name.endswith("png") else (output / name).touch()
    before = (output / name).read_bytes()
    arguments = ["evaluate", "--pictures", str(folder), "--instance_data_dir", str(photos), "--output_dir", str(output)]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert str(output / name) in told and "--overwrite" in told and told.count("\n") == 1
    assert [path.name for path in output.iterdir()] == [name] and (output / name).read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0


def test_pictures_of_one_prompt_need_one_size_for_lpips(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "mine")
    save_png(Image.new("RGB", (64, 72)), folder / "4.png", {"prompt": "a photo of sks robot on the beach"})
    arguments = ["evaluate", "--pictures", str(folder), "--instance_data_dir", str(photos), "--token", "sks", "--lpips"]
    assert main(arguments) == 2
    assert "0.png and " in (told := capsys.readouterr().err) and "of different sizes" in told


def test_adapters_of_different_subjects_have_no_prompts_in_common(tmp_path: Path) -> None:
    def header(trigger: str | None, class_word: str | None) -> AdapterHeader:
        return cast(AdapterHeader, SimpleNamespace(trigger=trigger, class_word=class_word))

    source = SubjectSource("subject", [], tmp_path)
    sks, zwx = header("sks robot", "robot"), header("zwx", "robot")
    assert words_of(source, [sks, header(None, None), header("sks", None)]) == SubjectWords("sks", "robot")
    with pytest.raises(UserError, match=r"the adapters of subject say 'sks' and 'zwx': .* give --token"):
        words_of(source, [sks, zwx])
    with pytest.raises(UserError, match=r"say 'robot' and 'mug': .* give --class_word"):
        words_of(source, [sks, header("sks", "mug")])
    assert words_of(replace(source, token="sks"), [sks, zwx]) == SubjectWords("sks", "robot")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "what should be scored? Give one of --adapter, --run, --pictures, --subjects"),
        ({"run": "x", "pictures": "y"}, "--run and --pictures don't go together"),
        ({"pictures": "mine"}, "--pictures needs the real photos beside them: --instance_data_dir"),
        ({"pictures": "nowhere", "instance_data_dir": "photos"}, "no such folder: nowhere"),
        ({"pictures": "mine", "instance_data_dir": "empty"}, "no usable photo in empty: it is empty"),
        ({"pictures": "mine", "instance_data_dir": "photos", "backbone": "toy-txt"}, "did you mean 'toy-text'?"),
        ({"pictures": "real", "instance_data_dir": "photos", "backbone": "toy-text"}, "not of some/base"),
        ({"pictures": "mine", "instance_data_dir": "photos", "num_images": "0"}, "--num_images must be at least 1"),
        ({"pictures": "mine", "instance_data_dir": "photos", "lpips": ""}, "--lpips needs the packages lpips and"),
        ({"adapter": "none.safetensors", "instance_data_dir": "photos"}, "none.safetensors"),
        (
            {"run": "photos", "instance_data_dir": "photos"},
            "photos holds no history: give the output folder of a training run",
        ),
        ({"run": "nowhere"}, "no such folder: nowhere"),
        ({"run": "photos/01.png"}, "01.png is no folder"),
        ({"adapter": "none.safetensors"}, "can't read 'none.safetensors': No such file"),
        ({"adapter": "none.safetensors", "height": "60"}, "--height must be a multiple of 8, got 60"),
        ({"adapter": "none.safetensors", "width": "100000"}, "--width must be at most 16384; got 100000"),
        ({"subjects": "list.yaml"}, "can't read --subjects list.yaml"),
        ({"subjects": "list.yaml", "token": "sks"}, "--token differs between subjects"),
    ],
)
def test_what_can_not_be_scored_is_one_line(
    change: dict[str, str],
    message: str,
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_pictures(tmp_path / "mine")
    write_pictures(tmp_path / "real", base="some/base")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments = [part for name, value in change.items() for part in (f"--{name}", value) if part]
    assert main(["evaluate", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize("kind", GUIDANCE)
def test_each_kind_of_base_draws_with_its_usual_guidance(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
    base = kind if kind == EMBEDDED_MODEL else str(tmp_path / "base")
    assert guidance_scale(EvaluationConfig(), base) == GUIDANCE[kind]
    assert guidance_scale(EvaluationConfig(guidance_scale=2.0), base) == 2.0


def test_a_single_file_draws_with_the_guidance_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    assert guidance_scale(EvaluationConfig(base_config=tmp_path), str(file)) == 3.5
