"""``svft-diffusion blend``: from files to a file, and what it refuses before the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import TEXT_WIDTH, tiny_inputs, tiny_pipeline

from svft_diffusion import SVDiffConfig, SVFTConfig, add_tokens, load_adapter, save_adapter, set_adapters
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, unload_adapter
from svft_diffusion.cli.main import main
from svft_diffusion.files import AdapterMetadata, read_adapter, read_header
from svft_diffusion.sampling.adapter_choice import WeightedFile, parse_adapter_choice, parse_weighted_file
from svft_diffusion.sampling.png import save_png

LAYERS = r".*\.(to_q|q_proj|conv1)"  # some of every block, so that the tests are quick


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model `base`, another one `other`, and adapters."""
    folder = tmp_path_factory.mktemp("blend")
    pipe, other = tiny_pipeline(0), tiny_pipeline(1)
    pipe.save_pretrained(folder / "base")
    other.save_pretrained(folder / "other")
    _write(pipe, SVFTConfig, folder / "dog.safetensors", 1, trigger="sks dog", class_word="dog")
    _write(
        pipe,
        partial(SVFTConfig, pattern="banded", off_diagonals=1),
        folder / "style.safetensors",
        2,
        trigger="sks style",
    )
    _write(pipe, SVDiffConfig, folder / "shift.safetensors", 3, trigger="sks dog")
    _write(pipe, partial(SVDiffConfig, rank=4), folder / "shift2.safetensors", 4)
    _write(other, SVFTConfig, folder / "foreign.safetensors", 5, base_name="other")
    return folder


def _write(
    pipe: object, make: Callable[..., SpectralConfig], file: Path, seed: int, base_name: str = "base", **facts: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for values in add_training_adapter(pipe, make(target_modules=LAYERS), "new"):
        values.data.copy_(0.3 * torch.randn(values.shape, generator=generator))
    save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name=base_name, **facts))
    unload_adapter(pipe, "new")


def blend(disk: Path, *arguments: str) -> int:
    """The exit code; names of files in ``disk`` get their folder, the base is that of the adapters."""
    files = [str(disk / word) if word.partition(":")[0].endswith(".safetensors") else word for word in arguments]
    base = [] if "--base" in files else ["--base", str(disk / "base")]
    return main(["blend", *files, *base])


def output(disk: Path, weights: dict[str, Any]) -> torch.Tensor:
    """What the UNet says with files at weights."""
    pipe = tiny_pipeline(0)
    for file in weights:
        load_adapter(pipe, disk / f"{file}.safetensors", file)
    set_adapters(pipe, weights)
    with torch.no_grad():
        found: torch.Tensor = pipe.unet(**tiny_inputs())[0]
        return found


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        (["dog.safetensors:0.7", "style.safetensors:-0.4"], {"dog": 0.7, "style": -0.4}),
        (["dog.safetensors:unet=0.6,te=0.2", "style.safetensors"], {"dog": {"unet": 0.6}, "style": 1.0}),
        (["shift.safetensors", "shift2.safetensors", "--average"], {"shift": 0.5, "shift2": 0.5}),
        (["shift.safetensors", "shift2.safetensors", "--interpolate", "0.2"], {"shift": 0.8, "shift2": 0.2}),
        (["dog.safetensors:0.3"], {"dog": 0.3}),
        (["dog.safetensors:0", "style.safetensors"], {"style": 1.0}),
    ],
)
def test_the_file_does_what_the_files_do_together(
    disk: Path, tmp_path: Path, arguments: list[str], weights: dict[str, Any]
) -> None:
    assert blend(disk, *arguments, "-o", str(tmp_path / "both.safetensors")) == 0
    expected = output(disk, weights)
    torch.testing.assert_close(output(tmp_path, {"both": 1.0}), expected, rtol=1e-5, atol=1e-5)
    assert (expected - output(disk, {"dog": 0.0})).abs().max() > 1e-3


def test_the_header_names_the_sources(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.safetensors"
    assert blend(disk, "shift.safetensors:0.5", "shift2.safetensors:te=0.2", "-o", str(out), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(out) and result["bytes"] == out.stat().st_size
    assert result["interference"]["clipping"]["trained"] > 0
    header = read_header(out)
    assert (header.method, header.rank, header.trigger, header.base.name) == ("svdiff", None, "sks dog", "base")
    sources = header.training["blend"]["sources"]
    assert [source["file"] for source in sources] == ["shift.safetensors", "shift2.safetensors"]
    assert [source["weight"] for source in sources] == [0.5, {"text_encoder": 0.2}]
    assert all(len(source["sha256"]) == 64 for source in sources)
    assert str(disk) not in out.read_bytes().decode("latin-1")
    again = tmp_path / "again.safetensors"
    assert blend(disk, "shift.safetensors:0.5", "shift2.safetensors:te=0.2", "-o", str(again)) == 0
    assert again.read_bytes() == out.read_bytes()


def test_triggers_are_joined_and_equal_ones_warned_of(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blend(disk, "dog.safetensors", "style.safetensors", "-o", str(tmp_path / "a.safetensors")) == 0
    assert read_header(tmp_path / "a.safetensors").trigger == "sks dog, sks style"
    assert read_header(tmp_path / "a.safetensors").class_word == "dog"
    assert capsys.readouterr().err == ""
    assert blend(disk, "dog.safetensors", "dog.safetensors:-0.5", "-o", str(tmp_path / "b.safetensors")) == 0
    assert "have the same trigger 'sks dog'" in capsys.readouterr().err


def test_a_report_writes_nothing(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(disk.iterdir())
    assert blend(disk, "dog.safetensors", "style.safetensors", "--report") == 0
    shown = capsys.readouterr().out
    assert "dog / style" in shown and "unet.mid_block" in shown and "equal norms: dog" in shown
    assert sorted(disk.iterdir()) == before and not list(tmp_path.iterdir())


def test_a_report_beside_a_blend(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.safetensors"
    assert blend(disk, "dog.safetensors", "style.safetensors", "--report", "-o", str(out)) == 0
    shown = capsys.readouterr().out
    assert "layers that share most" in shown and f"wrote {out}" in shown
    plain = tmp_path / "plain.safetensors"
    assert blend(disk, "dog.safetensors", "style.safetensors", "-o", str(plain)) == 0
    assert out.read_bytes() == plain.read_bytes()


def test_a_title_and_a_trigger_of_its_own(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    facts = ("--title", "Dog & style", "--trigger", "sks both")
    assert blend(disk, "dog.safetensors", "style.safetensors", *facts, "-o", str(out)) == 0
    header = read_header(out)
    assert (header.title, header.trigger) == ("Dog & style", "sks both")


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["dog.safetensors:1e30", "--dtype", "float16", "-o", "x.safetensors"], "float16 ends at 65504"),
        (["dog.safetensors:te=1e30", "--dtype", "float16", "-o", "x.safetensors"], "float16 ends at 65504"),
        (["dog.safetensors", "style.safetensors:1e300", "-o", "x.safetensors"], "float32 ends at 3.4028e+38"),
        (["dog.safetensors:-1e300", "--report"], "float32 ends at 3.4028e+38"),
    ],
)
def test_weights_that_overflow_are_refused_before_the_base_is_loaded(
    disk: Path, arguments: list[str], limit: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svft_diffusion.cli.blend.load_base", lambda *_: pytest.fail("the base was loaded"))
    assert blend(disk, *arguments) == 2
    said = capsys.readouterr().err
    assert limit in said and "use a smaller weight" in said and said.count("\n") == 1 and "training" not in said


def test_a_sum_that_overflows_blames_the_sum(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.safetensors"
    largest = max(float(tensor.abs().max()) for key, tensor in read_adapter(disk / "dog.safetensors")[1].items()
                  if key.endswith(".values"))  # fmt: skip
    half = f"dog.safetensors:{60000 / largest}"
    assert blend(disk, half, half, "--dtype", "float16", "-o", str(out)) == 2
    said = capsys.readouterr().err
    assert "too large for float16" in said and "training" not in said and not out.exists()


def test_a_plot_beside_a_report(disk: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert blend(disk, "dog.safetensors", "style.safetensors", "--report", "--plot", str(plot)) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dog.safetensors", "--plot", "new.png"], "there is only one"),
        (["dog.safetensors", "style.safetensors:0", "--plot", "new.png"], "there is only one"),
        (["dog.safetensors", "style.safetensors", "--plot", "file/new.png"], "can't write to"),
        (["picture.png", "style.safetensors", "--plot", "picture.png", "--overwrite"], "one of the files to read"),
        (["dog.safetensors", "style.safetensors", "--plot", "picture.png"], "there already"),
    ],
)
def test_a_plot_that_can_not_be_is_refused_before_anything_is_written(
    disk: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    carrier = save_png(
        Image.new("RGB", (4, 4)), tmp_path / "picture.png", {}, [(disk / "dog.safetensors").read_bytes()]
    )
    before = carrier.read_bytes()
    given = [str(tmp_path / word) if ".png" in word else word for word in arguments]
    assert blend(disk, *given, "-o", str(tmp_path / "x.safetensors")) == 2
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"file", "picture.png"} and carrier.read_bytes() == before


def test_the_relu_is_counted_for_the_sum_that_is_written(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def clipping(*arguments: str) -> Any:
        out = str(tmp_path / "x.safetensors")
        files = ("shift.safetensors", "shift2.safetensors")
        assert blend(disk, *files, *arguments, "-o", out, "--overwrite", "--json") == 0
        return json.loads(capsys.readouterr().out)["interference"]["clipping"]

    plain, balanced = clipping(), clipping("--balance")
    assert plain["clipped"] != balanced["clipped"] and plain["trained"] == balanced["trained"]
    assert clipping("--style_mix") is None


def test_the_base_keeps_the_name_that_the_files_have_for_it(disk: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "here", tmp_path / "x.safetensors"
    base.symlink_to(disk / "base", target_is_directory=True)
    assert blend(disk, "dog.safetensors", "--base", str(base), "-o", str(out)) == 0
    assert read_header(out).base.name == "base"
    arguments = ("--on_mismatch", "force", "--overwrite")
    assert blend(disk, "dog.safetensors", "--base", str(disk / "other"), "-o", str(out), *arguments) == 0
    assert read_header(out).base.name == "other"


def test_balanced_weights(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "both.safetensors")
    assert blend(disk, "dog.safetensors", "style.safetensors", "--balance", "-o", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == result["interference"]["weights"] == result["interference"]["balancing_weights"]
    norms = result["interference"]["total"]["norms"]
    assert norms["dog"] == pytest.approx(norms["style"])
    torch.testing.assert_close(output(tmp_path, {"both": 1.0}), output(disk, result["weights"]), rtol=1e-5, atol=1e-5)


def test_a_style_mix(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "mix.safetensors"
    assert blend(disk, "shift.safetensors", "shift2.safetensors", "--style_mix", "-o", str(out)) == 0
    entry = read_header(out).training["blend"]
    assert entry["operation"] == "style mix" and "mid_block" in entry["geometry_blocks"]
    blocks = entry["geometry_blocks"]
    weights = {
        "shift": {"unet": dict.fromkeys(blocks, 1.0)},
        "shift2": {"unet": {"": 1.0, **dict.fromkeys(blocks, 0.0)}, "text_encoder": 1.0},
    }
    torch.testing.assert_close(output(tmp_path, {"mix": 1.0}), output(disk, weights), rtol=1e-5, atol=1e-5)


def test_learned_tokens_of_all_sources_are_in_the_file(disk: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline(0)
    rows = {"<one>": torch.linspace(0, 1, TEXT_WIDTH), "<two>": torch.linspace(1, 2, TEXT_WIDTH)}
    for file, (token, row) in zip(("dog", "style"), rows.items(), strict=True):
        load_adapter(pipe, disk / f"{file}.safetensors", file)
        add_tokens(pipe, file, {"text_encoder": {token: row}})
        save_adapter(pipe, file, tmp_path / f"{file}.safetensors", metadata=AdapterMetadata(base_name="base"))
    out = tmp_path / "both.safetensors"
    assert (
        blend(tmp_path, "dog.safetensors:0.5", "style.safetensors", "--base", str(disk / "base"), "-o", str(out)) == 0
    )
    header, tensors = read_adapter(out)
    assert header.tokens == {"text_encoder": ["<one>", "<two>"]}
    torch.testing.assert_close(tensors["text_encoder.tokens"], torch.stack(list(rows.values())))


def test_values_in_half_precision(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    assert blend(disk, "dog.safetensors", "-o", str(out), "--dtype", "float16") == 0
    assert read_header(out).value_dtype == "float16"
    assert out.stat().st_size < (disk / "dog.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dog.safetensors:0.5:0.2", "-o", "x.safetensors"], "write FILE:unet=0.5,te=0.2"),
        (["dog.safetensors:0.5,0.2", "-o", "x.safetensors"], "tools disagree"),
        (["dog.safetensors:vae=0.5", "-o", "x.safetensors"], "no component 'vae'"),
        (["dog.safetensors:te=0.5,te=1", "-o", "x.safetensors"], "two weights"),
        (["dog.safetensors:te=nan", "-o", "x.safetensors"], "finite"),
        (["dog.safetensors", "0.7", "-o", "x.safetensors"], "a weight follows a colon"),
        (["dog.safetensors", "style.safetensors"], "say where to write"),
        (["dog.safetensors", "-o", "dog.safetensors"], "one of the files to read"),
        (["dog.safetensors", "-o", "style.safetensors"], "there already"),
        (["dog.safetensors", "--interpolate", "0.5", "-o", "x.safetensors"], "takes two adapters"),
        (["dog.safetensors:0.2", "style.safetensors", "--average", "-o", "x.safetensors"], "without weights"),
        (["dog.safetensors", "style.safetensors", "--average", "--style_mix", "-o", "x.safetensors"], "exclude"),
        (["dog.safetensors", "--geometry_blocks", "mid_block", "-o", "x.safetensors"], "belongs to --style_mix"),
        (["dog.safetensors", "shift.safetensors", "-o", "x.safetensors"], "keep both files"),
        (["dog.safetensors", "foreign.safetensors", "-o", "x.safetensors"], "foreign.safetensors"),
        (["none.safetensors", "-o", "x.safetensors"], "can't read"),
        (["dog.safetensors:0", "-o", "x.safetensors"], "all weights are 0"),
        (["dog.safetensors", "dog.safetensors:-1", "-o", "x.safetensors"], "nothing is left: the adapters cancel"),
        (["dog.safetensors", "--title", "x" * 201, "-o", "x.safetensors"], "the title"),
        (["dog.safetensors", "--trigger", "a\nb", "-o", "x.safetensors"], "the trigger"),
        (["dog.safetensors", "--trigger", "sks", "--report"], "--trigger belongs to -o"),
        (
            [
                "dog.safetensors",
                "style.safetensors",
                "--style_mix",
                "--geometry_blocks",
                "mid_block",
                "mid_blok",
                "-o",
                "x.safetensors",
            ],
            "the unet has no module 'mid_blok'",
        ),
    ],
)
def test_refused_in_one_line(
    disk: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in disk.glob("*.safetensors")}
    assert blend(disk, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert {file: file.stat().st_mtime_ns for file in disk.glob("*.safetensors")} == before


def test_adapters_of_other_bases_name_them_both(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(disk / "dog.safetensors"), str(disk / "foreign.safetensors")]
    assert main(["blend", *files, "--report"]) == 2
    assert "was trained on base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:-0.5", "dog.safetensors", -0.5),
        ("dog.safetensors:unet=0.5,te=0.2,te2=0.1", "dog.safetensors",
         {"unet": 0.5, "text_encoder": 0.2, "text_encoder_2": 0.1}),
        ("dog.safetensors:transformer=1,te3=2", "dog.safetensors", {"transformer": 1.0, "text_encoder_3": 2.0}),
        ("dog.safetensors:text_encoder=2", "dog.safetensors", {"text_encoder": 2.0}),
        (r"C:\a\dog.safetensors:te=0.2", r"C:\a\dog.safetensors", {"text_encoder": 0.2}),
        (r"C:\a\dog.safetensors", r"C:\a\dog.safetensors", 1.0),
    ],
)  # fmt: skip
def test_weights_of_components_follow_the_last_colon(text: str, file: str, weight: Any) -> None:
    assert parse_weighted_file(text) == WeightedFile(Path(file), weight)
    if isinstance(weight, float):
        assert parse_adapter_choice(text).weight == weight
