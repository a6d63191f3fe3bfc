"""Training runs on a tiny base model: what they write, that they resume exactly, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tiny_models import tiny_pipeline

from svft_diffusion import load_adapter
from svft_diffusion.adapters.training import adapter_state
from svft_diffusion.cli.main import run_command
from svft_diffusion.data.class_images import MANIFEST_FILE
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.models import family_of, load_pipeline
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training import trainer
from svft_diffusion.training.batches import SampleNumbers
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.objective import denoising_losses, draw_randomness
from svft_diffusion.training.setup import ADAPTER_NAME
from svft_diffusion.training.trainer import StepReport, TrainingDiverged, train

REPOSITORY = Path(__file__).parent.parent
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with tiny random weights."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos of different shapes, and files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, size in enumerate([(16, 16), (20, 30), (40, 18), (9, 9), (16, 24)]):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no photo", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"\0")
    return folder


@pytest.fixture
def config(base: Path, photos: Path, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=photos,
        instance_prompt=PROMPT,
        output_dir=tmp_path / "out",
        train_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=2,
        learning_rate=0.05,
        report_to="none",
    )


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")}


def arguments(config: TrainingConfig, **changes: Any) -> list[str]:
    """The same run as a command line."""
    values = {
        "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
        "instance_data_dir": config.instance_data_dir,
        "instance_prompt": config.instance_prompt,
        "output_dir": config.output_dir,
        "train_batch_size": config.train_batch_size,
        "max_train_steps": config.max_train_steps,
        "checkpointing_steps": config.checkpointing_steps,
        "learning_rate": config.learning_rate,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def picture(base: Path, adapter: Path | None) -> np.ndarray:
    pipeline = load_pipeline(str(base))
    if adapter is not None:
        load_adapter(pipeline, adapter)
    return np.asarray(generate(pipeline, PROMPT, seed=1, num_inference_steps=2))


def test_run_writes_everything(config: TrainingConfig, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[StepReport] = []
    result = train(
        replace(config, validation_prompt=PROMPT, num_validation_images=1, validation_steps=2), on_step=reports.append
    )
    out = config.output_dir
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-000000-0.png",
        "step-000002-0.png",
        "step-000004-0.png",
    ]
    header, tensors = read_adapter(result.adapter)
    assert result.adapter == out / "adapter.safetensors"
    assert header.instance_prompt == PROMPT and header.base.name == "tiny" and header.training["max_train_steps"] == 4
    assert {name.split(".")[0] for name in tensors} == {"unet"}
    assert sum(tensor.numel() for tensor in tensors.values()) == result.trained_values
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] == [report.step for report in reports]
    assert metrics[-1]["loss"] == result.last_loss == reports[-1].loss
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: tiny\n") and PROMPT in card and str(base.parent) not in card
    assert (out / "example.png").is_file()
    printed = capsys.readouterr().out
    assert ".DS_Store (hidden file), notes.txt (not a picture)" in printed and "photos: 5" in printed

    assert not np.array_equal(picture(base, result.adapter), picture(base, None))
    # Intermediate checkpoints are adapters too, and differ from the last.
    assert not np.array_equal(picture(base, out / "checkpoint-2" / "adapter.safetensors"), picture(base, None))
    last = out / "checkpoint-4" / "adapter.safetensors"
    assert last.read_bytes() == result.adapter.read_bytes()


def test_same_settings_give_the_same_file(config: TrainingConfig, tmp_path: Path) -> None:
    first = train(config).adapter.read_bytes()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert train(replace(config, output_dir=tmp_path / "again")).adapter.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), before)
    assert train(replace(config, output_dir=tmp_path / "other", seed=1)).adapter.read_bytes() != first


def test_saved_config_gives_the_same_file(config: TrainingConfig, tmp_path: Path) -> None:
    first = train(replace(config, learning_rate=None, pattern="banded")).adapter
    again = tmp_path / "again"
    file = config.output_dir / "config.yaml"
    assert run_command("train", ["--config", str(file), "--output_dir", str(again)]) == 0
    assert (again / "adapter.safetensors").read_bytes() == first.read_bytes()


def test_text_encoder_gets_keys_and_its_own_learning_rate(config: TrainingConfig) -> None:
    result = train(replace(config, train_text_encoder=True, text_encoder_lr=0.001, max_train_steps=2))
    _, tensors = read_adapter(result.adapter)
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder"}
    # AdamW moves every value by about the learning rate in each step.
    largest = {part: max(t.abs().max() for n, t in tensors.items() if n.startswith(part)) for part in ("unet", "text")}
    assert 0.0005 < largest["text"] < 0.003 and 0.04 < largest["unet"] < 0.12


def test_limit_keeps_the_newest(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=7, checkpoints_total_limit=2))
    assert checkpoints(config.output_dir) == {"checkpoint-4", "checkpoint-6"}


def test_limit_removes_several_after_resuming(config: TrainingConfig) -> None:
    train(config)
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-4"}
    train(replace(config, max_train_steps=8, resume_from_checkpoint="checkpoint-4", checkpoints_total_limit=2))
    assert checkpoints(config.output_dir) == {"checkpoint-6", "checkpoint-8"}


def test_limit_counts_no_later_checkpoints_of_an_earlier_run(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=8))
    changed = replace(config, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1, max_train_steps=4)
    train(changed)
    # What was written just now stays; what another run wrote beyond it is not ours to remove.
    assert checkpoints(config.output_dir) == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_text_encoder": True, "gradient_accumulation_steps": 2, "method": "svdiff"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "cache_latents": False, "timestep_sampling": "focused"},
    ],
)
def test_resumed_run_equals_uninterrupted(config: TrainingConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(config, max_train_steps=6, **changes)
    whole = train(config).adapter.read_bytes()
    parts = replace(config, output_dir=tmp_path / "parts")

    def stop_at_five(report: StepReport) -> None:
        if report.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(parts, on_step=stop_at_five)
    assert not (parts.output_dir / "adapter.safetensors").exists()
    result = train(replace(parts, resume_from_checkpoint="latest"))
    assert result.adapter.read_bytes() == whole
    lines = [(folder / "metrics.jsonl").read_bytes() for folder in (config.output_dir, parts.output_dir)]
    assert lines[0] == lines[1]


def test_interrupted_run_is_saved_and_resumes_exactly(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(config).adapter.read_bytes()
    parts = replace(config, output_dir=tmp_path / "parts")

    def press_control_c(report: StepReport) -> None:
        if report.step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(parts, on_step=press_control_c)
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert checkpoints(parts.output_dir) == {"checkpoint-2", "checkpoint-3"}
    assert (parts.output_dir / "adapter.safetensors").is_file()
    assert train(replace(parts, resume_from_checkpoint="latest")).adapter.read_bytes() == whole


def test_damaged_or_foreign_checkpoints_are_refused(config: TrainingConfig) -> None:
    train(config)
    resumed = replace(config, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(UserError, match="trained with method=svft, now it is svdiff"):
        train(replace(resumed, method="svdiff"))
    # The optimizer's state holds the old rate, which would go on silently.
    with pytest.raises(UserError, match=r"trained with learning_rate=0\.05, now it is 0\.01"):
        train(replace(resumed, learning_rate=0.01))
    with pytest.raises(UserError, match="past --max_train_steps 1"):
        train(replace(resumed, max_train_steps=1))
    state = config.output_dir / "checkpoint-2" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError, match=r"training_state\.safetensors is damaged"):
        train(resumed)
    state.unlink()
    with pytest.raises(UserError, match="checkpoint-2 is incomplete"):
        train(resumed)


def test_divergence_stops_and_keeps_what_is_saved(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.denoising_losses
    calls: list[int] = []

    def broken(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        losses = real(*positional, **named)
        return replace(losses, total=losses.total * float("nan")) if len(calls) == 4 else losses

    monkeypatch.setattr(trainer, "denoising_losses", broken)
    with pytest.raises(TrainingDiverged, match="step 4"):
        train(config)
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    assert not (config.output_dir / "adapter.safetensors").exists()


def test_prior_preservation_draws_reuses_and_redraws_class_images(config: TrainingConfig, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior = replace(
        config,
        with_prior_preservation=True,
        class_data_dir=folder,
        class_prompt="a photo of a dog",
        num_class_images=3,
        sample_batch_size=2,
        prior_generation_num_inference_steps=2,
        max_train_steps=1,
        checkpointing_steps=10,
    )
    train(prior)
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(drawn) == [f"class-{index:05d}.png" for index in range(3)] and len(set(drawn.values())) == 3
    line = json.loads((config.output_dir / "metrics.jsonl").read_text(encoding="utf-8"))
    assert line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"])

    (folder / "class-00001.png").unlink()
    (folder / ".DS_Store").write_bytes(b"\0")
    times = {name: (folder / name).stat().st_mtime_ns for name in ("class-00000.png", "class-00002.png")}
    train(prior)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert (folder / "class-00001.png").is_file()

    train(replace(prior, class_prompt="a red dog"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["recipe"]["prompts"] == ["a red dog"] and manifest["drawn"] == [0, 1, 2]
    assert (folder / "class-00000.png").read_bytes() != drawn["class-00000.png"]

    Image.new("RGB", (16, 16)).save(folder / "own.png")
    train(replace(prior, class_prompt="a red dog", num_class_images=1))  # the given picture is enough
    assert json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")) == manifest


def test_class_images_train_with_their_own_prompts(config: TrainingConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog on the beach\na red dog\n", encoding="utf-8")
    train(
        replace(
            config,
            with_prior_preservation=True,
            class_data_dir=tmp_path / "class",
            class_prompts_file=prompts,
            num_class_images=3,
            prior_generation_num_inference_steps=1,
            max_train_steps=1,
        )
    )
    chunks = [Image.open(tmp_path / "class" / f"class-{index:05d}.png").info["svft_diffusion"] for index in range(3)]
    assert [json.loads(chunk)["prompt"] for chunk in chunks] == [
        "a dog on the beach",
        "a red dog",
        "a dog on the beach",
    ]


def test_bfloat16_base_trains_float32_values(config: TrainingConfig) -> None:
    result = train(
        replace(
            config,
            mixed_precision="bf16",
            gradient_checkpointing=True,
            train_text_encoder=True,
            validation_prompt=PROMPT,
            num_validation_images=1,
            max_train_steps=2,
        )
    )
    _, tensors = read_adapter(result.adapter)
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    assert len(result.samples) == 1


def test_gradient_checkpointing_changes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, train_text_encoder=True, max_train_steps=2)
    plain = train(config).adapter.read_bytes()
    saving = train(replace(config, gradient_checkpointing=True, output_dir=tmp_path / "saving")).adapter.read_bytes()
    assert saving == plain


def test_two_processes_see_what_one_sees_with_twice_the_accumulation() -> None:
    alone = SampleNumbers(batch_size=3, accumulation=4, processes=1, process=0).batches(2, 5)
    shared = [SampleNumbers(3, 2, 2, process).batches(2, 5) for process in (0, 1)]
    merged = [batch for pair in zip(*shared, strict=True) for batch in pair]
    assert merged == alone and merged[0] == range(24, 27)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_follows_the_scheduler(prediction_type: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=prediction_type
    )
    family = family_of(pipeline)
    latents, noise = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    timesteps = torch.tensor([0, 900])
    alpha = pipeline.scheduler.alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    expected = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(family.target(latents, noise, timesteps), expected)
    torch.testing.assert_close(
        family.add_noise(latents, noise, timesteps), alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    )


def test_prior_loss_weight_counts_the_second_half() -> None:
    family = family_of(tiny_pipeline())
    with torch.no_grad():
        latents = family.encode_pictures(torch.rand(4, 3, 16, 16) * 2 - 1)
        conditioning = family.encode_prompts(family.token_ids([PROMPT] * 4))
        samples = [("instance", 0), ("instance", 1), ("class", 0), ("class", 1)]
        randomness = draw_randomness(0, samples, latents.mean, timestep_sampling="uniform", number_of_timesteps=1000)
        losses = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=0.25)
        without = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=None)
    assert losses.prior is not None
    torch.testing.assert_close(losses.total, losses.instance + 0.25 * losses.prior)
    torch.testing.assert_close(without.total, (losses.instance + losses.prior) / 2)
    assert not torch.equal(randomness.noise[0], randomness.noise[2])


def test_randomness_belongs_to_the_sample_and_not_to_its_batch() -> None:
    like = torch.zeros(3, 4, 8, 8)
    options: dict[str, Any] = {"timestep_sampling": "focused", "number_of_timesteps": 1000}
    together = draw_randomness(5, [("instance", 7), ("class", 7), ("instance", 8)], like, **options)
    alone = draw_randomness(5, [("instance", 8)], like, **options)
    assert torch.equal(together.noise[2], alone.noise[0]) and together.timesteps[2] == alone.timesteps[0]
    many = draw_randomness(5, [("instance", number) for number in range(2000)], like[:, :1, :1, :1], **options)
    assert many.timesteps.min() >= 0 and many.timesteps.max() <= 999
    assert 570 < many.timesteps.float().mean() < 630  # 0.25 * 500 + 0.75 * E[1000 sigmoid(0.6 + 0.8 n)]


def test_trained_values_reach_the_file_unchanged(config: TrainingConfig, base: Path) -> None:
    result = train(config)
    pipeline = load_pipeline(str(base))
    name = load_adapter(pipeline, result.adapter, ADAPTER_NAME)
    _, tensors = read_adapter(result.adapter)
    state = adapter_state(pipeline, name)
    assert state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "no such folder"),
        ({"instance_prompt": None}, "no prompt"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no such base model folder"),
        ({"method": "lora"}, "invalid choice"),
        ({"learning_rat": "1"}, "did you mean '--learning_rate'"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint"),
        ({"rank": "1000"}, "singular values"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(
    config: TrainingConfig, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = run_command("train", arguments(config, **changes))
    except SystemExit as end:  # argparse ends the program itself
        code = end.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not config.output_dir.exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "README.md", "config.yaml"])
def test_command_overwrites_no_file_of_others(
    config: TrainingConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.output_dir.mkdir()
    (config.output_dir / name).write_text("precious", encoding="utf-8")
    assert run_command("train", arguments(config)) == 2
    assert f"{name} is there already" in capsys.readouterr().err
    assert [path.name for path in config.output_dir.iterdir()] == [name]
    assert (config.output_dir / name).read_text(encoding="utf-8") == "precious"


def test_run_that_died_before_its_first_checkpoint_starts_again(config: TrainingConfig) -> None:
    def power_cut(report: StepReport) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(config, on_step=power_cut)
    assert run_command("train", arguments(config, max_train_steps=1)) == 0


@pytest.mark.parametrize("index", ['{"_class_name": "FooPipeline"}', "[]", "{"])
def test_damaged_base_is_named_in_one_line(config: TrainingConfig, tmp_path: Path, index: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match="the base model damaged can't be loaded") as refusal:
        load_pipeline(str(folder))
    assert "\n" not in str(refusal.value)


def test_upload_leaves_out_checkpoints_curves_and_paths_of_this_machine(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, name: str, *, exist_ok: bool) -> RepoUrl:
            return RepoUrl(f"https://huggingface.co/someone/{name}")

        def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **named: str) -> None:
            files = (path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
            uploaded.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr("svft_diffusion.training.hub.HfApi", Hub)
    train(replace(config, push_to_hub=True))
    assert sorted(uploaded) == ["README.md", "adapter.safetensors", "metrics.jsonl"]


def test_accelerate_launch(config: TrainingConfig) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments(config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.output_dir.parent)
    assert done.returncode == 0, done.stderr
    launched = (config.output_dir / "adapter.safetensors").read_bytes()
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-4"}
    here = train(replace(config, output_dir=config.output_dir.parent / "here"))
    assert here.adapter.read_bytes() == launched
