"""Damaged and hostile files: the right adapter or one line that says why not, soon, in little memory, nothing executed.

``make test`` draws some cases, the same every time; ``make test-fuzz`` goes through every bit, cut and mutant.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from adapted_models import digest_of_base
from file_judge import Findings, Judge, same_tensors
from foreign_files import LINEAR, OfficialSVFT, kohya_file, lora_factors, svdiff_deltas, svft_state, written
from hostile_files import (
    Mutant,
    Parts,
    flipped,
    mutant_of,
    random_mutants,
    sampled,
    single_changes,
)
from hostile_pickles import hostile_files
from hostile_pictures import picture_changes, picture_without_adapter, with_chunk
from hostile_sizes import byte_changes, heavy_files
from PIL import Image
from tiny_models import tiny_inputs, tiny_pipeline
from torch import Tensor, nn

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig, load_adapter, save_adapter
from svft_diffusion.adapters import (
    SpectralConfig,
    add_training_adapter,
    loaded_adapters,
    unload_adapter,
)
from svft_diffusion.cli.main import COMMANDS, main
from svft_diffusion.exchange.importing import import_adapter, recognised
from svft_diffusion.files import AdapterMetadata, adapter_bytes, read_adapter, read_header
from svft_diffusion.sampling.adapter_choice import AdapterChoice, check_adapters

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"  # 24 x 24, with a bias
NORM = "mid_block.attentions.0.transformer_blocks.0.norm1"
CONV = "conv_in"  # 16 x 36
CONFIGS: dict[str, Callable[[], SpectralConfig]] = {
    "plain": lambda: SVFTConfig(target_modules=[LAYER]),
    "banded": lambda: SVFTConfig(pattern="banded", off_diagonals=1, rank=9, target_modules=[CONV]),
    "random positions": lambda: SVFTConfig(pattern="random", off_diagonals=1, rank=6, target_modules=[LAYER]),
    "gate": lambda: SVFTConfig(init="official", rank=7, target_modules=[LAYER]),
    "svdiff with norm": lambda: SVDiffConfig(target_modules=[LAYER, NORM], train_norm=True, norm_shift="scalar"),
    "biases": lambda: VectorFitConfig(train_values=False, target_modules=[LAYER, NORM], train_norm=True),
    "siva": lambda: SiVAConfig(fraction=0.4, select="random", target_modules=[LAYER, CONV]),
    "float16": lambda: VectorFitConfig(target_modules=[LAYER]),
}
KINDS = (*CONFIGS, "picture")
every_kind = pytest.mark.parametrize("kind", KINDS)

SPARE_BYTES = 64 * 2**20  # that a file may take beyond twice its size

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by what Linux keeps of a process")


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    pipe = tiny_pipeline()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.fixture(scope="module")
def adapters(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small adapter file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    contents = {}
    unet = {"unet": models["unet"]}
    for kind, config in CONFIGS.items():
        generator = torch.Generator().manual_seed(5)
        for values in add_training_adapter(unet, config(), "good"):
            values.data.copy_(0.3 * torch.randn(values.shape, generator=generator))
        value_dtype = "float16" if kind == "float16" else "float32"
        metadata = AdapterMetadata(
            base_name="tiny", trigger="sks", training={"steps": 3, "rates": [0.05, None]}, value_dtype=value_dtype
        )
        file = save_adapter(unet, "good", folder / f"{kind}.safetensors", metadata=metadata)
        unload_adapter(unet, "good")
        contents[kind] = file.read_bytes()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(folder / "x.png")
    contents["picture"] = with_chunk((folder / "x.png").read_bytes(), b"svFt", contents["plain"])
    return contents


# Damage


def _flips(good: bytes, bits: Iterable[int]) -> Iterator[Mutant]:
    return (Mutant(f"bit {bit}", flipped(good, bit), False) for bit in bits)


def _cuts(good: bytes, lengths: Iterable[int]) -> Iterator[Mutant]:
    return (Mutant(f"the first {length} bytes", good[:length], False) for length in lengths)


@every_kind
def test_flipped_bits_and_cuts(kind: str, adapters: dict[str, bytes], tmp_path: Path) -> None:
    good = adapters[kind]
    judge = Judge(good, tmp_path)
    judge.go_through(_flips(good, sampled(range(8 * len(good)), 400, seed=1)))
    judge.go_through(_cuts(good, sampled(range(len(good)), 100, seed=2)))
    judge.check()


@pytest.mark.slow
@every_kind
def test_every_flipped_bit_and_every_cut(kind: str, adapters: dict[str, bytes], tmp_path: Path) -> None:
    good = adapters[kind]
    judge = Judge(good, tmp_path)
    judge.go_through(_flips(good, range(8 * len(good))))
    judge.go_through(_cuts(good, range(len(good))))
    judge.check()
    print(f"{kind}: {judge.read} read, {judge.accepted} of them as the good file")


@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_changed_pictures(part: int, adapters: dict[str, bytes], tmp_path: Path) -> None:
    judge = Judge(adapters["picture"], tmp_path)
    changes = [Mutant(*change, honest=False) for change in picture_changes(adapters["picture"], adapters["plain"])]
    judge.go_through(changes[::part])
    judge.check()
    assert 0 < judge.accepted < judge.read


# Mutants


def _mutants(good: bytes, count: int | None, seed: int) -> Iterator[Mutant]:
    """All single changes and as many random ones; or ``count`` of each sort."""
    changes = list(single_changes(Parts.of(good)))
    of_bytes = [Mutant(*change, honest=False) for change in byte_changes(good)]
    number = len(changes) // 4 if count is None else count
    for change in changes if count is None else sampled(changes, 3 * count, seed):
        yield mutant_of(good, change, honest=True)
    for change in changes if count is None else sampled(changes, count, seed + 1):
        yield mutant_of(good, change, honest=False)
    yield from of_bytes if count is None else sampled(of_bytes, count, seed)
    yield from random_mutants(good, number, seed)


def _judge_mutants(kind: str, adapters: Mapping[str, bytes], folder: Path, count: int | None) -> Judge:
    good = adapters[kind]
    judge = Judge(good, folder)
    for mutant, (header, tensors) in judge.take(_mutants(good, count, seed=len(kind))):
        # What was read can be written, or not: folders in its header are cut off then.
        again: list[bytes] = []
        if not judge.refused(
            f"{mutant.label}, written", lambda h=header, t=tensors, a=again: a.append(adapter_bytes(h, t))
        ):
            judge.file.write_bytes(again[0])
            _, second = read_adapter(judge.file)
            if not same_tensors(tensors, second):
                judge.failures.append(f"{mutant.label}: written again, it is another")
    return judge


@pytest.mark.parametrize("kind", CONFIGS)
def test_mutants(kind: str, adapters: dict[str, bytes], tmp_path: Path) -> None:
    judge = _judge_mutants(kind, adapters, tmp_path, 40)
    judge.check()
    assert 0 < judge.accepted < judge.read


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_mutant(kind: str, adapters: dict[str, bytes], tmp_path: Path) -> None:
    judge = _judge_mutants(kind, adapters, tmp_path, None)
    print(f"{kind}: {judge.read} read, {judge.accepted} accepted")
    judge.check()
    assert judge.read > 10_000 // len(CONFIGS)


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_reads_well_loads_or_leaves_no_trace(
    kind: str, count: int, adapters: dict[str, bytes], models: dict[str, nn.Module], tmp_path: Path
) -> None:
    good = adapters[kind]
    judge = Judge(good, tmp_path)
    untouched = _output(models)
    before = digest_of_base(models["unet"]), digest_of_base(models["text_encoder"])
    changes = list(single_changes(Parts.of(good)))
    honest = (mutant_of(good, change, honest=True) for change in sampled(changes, 20 * count, seed=4))
    loaded = 0
    for mutant, _ in itertools.islice(judge.take(honest), count):
        for choice in ("error", "force"):
            if not judge.refused(
                f"{mutant.label}, loaded", lambda c=choice: load_adapter(models, judge.file, "mutant", on_mismatch=c)
            ):
                loaded += 1
                unload_adapter(models, "mutant")
            assert loaded_adapters(models) == [], mutant.label
    judge.check()
    assert loaded > 0
    assert torch.equal(_output(models), untouched)
    assert (digest_of_base(models["unet"]), digest_of_base(models["text_encoder"])) == before


def _output(models: Mapping[str, nn.Module]) -> Tensor:
    with torch.no_grad():
        sample: Tensor = models["unet"](**tiny_inputs()).sample
    return sample


# Small files that ask for much


@pytest.fixture(scope="module")
def heavy(adapters: dict[str, bytes]) -> dict[str, bytes]:
    return dict(heavy_files(adapters["plain"]))


@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_small_files_that_ask_for_much(
    part: int, adapters: dict[str, bytes], heavy: dict[str, bytes], tmp_path: Path
) -> None:
    judge = Judge(adapters["plain"], tmp_path)
    cases = [Mutant(*case, honest=True) for case in [*heavy.items()][::part]]
    for mutant, (header, tensors) in judge.take(cases):
        judge.refused(f"{mutant.label}, written", lambda h=header, t=tensors: adapter_bytes(h, t))  # type: ignore[misc]
    judge.check()


def _check_memory(action: str, good: bytes, cases: Mapping[str, bytes], folder: Path) -> None:
    """No case may take more than twice its size and what is spared."""
    files = {str(folder / f"{index}.safetensors"): case for index, case in enumerate(cases.items())}
    for file, (_, content) in files.items():
        Path(file).write_bytes(content)
    (folder / "good.safetensors").write_bytes(good)
    program = Path(__file__).with_name("reading_memory.py")
    command = [sys.executable, str(program), action, str(folder / "good.safetensors"), *files]
    result = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stderr[-2000:]
    too_much = {
        files[file][0]: f"{taken / 2**20:.0f} MiB for {len(files[file][1]) / 2**20:.1f} MiB"
        for file, taken in json.loads(result.stdout).items()
        if taken > 2 * len(files[file][1]) + SPARE_BYTES
    }
    assert not too_much


@on_linux
@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.slow), 24])
def test_small_files_take_little_memory(
    part: int, adapters: dict[str, bytes], heavy: dict[str, bytes], tmp_path: Path
) -> None:
    _check_memory("read", adapters["plain"], dict([*heavy.items()][::part]), tmp_path)


@on_linux
@pytest.mark.slow
def test_a_large_file_is_in_memory_twice_at_most(adapters: dict[str, bytes], tmp_path: Path) -> None:
    parts = Parts.of(adapters["plain"])
    name = next(name for name in parts.tensors if name.endswith(".values"))
    count = 50_000_000
    parts.replace(name, struct.pack("<f", 0.25) * count, [count])
    _check_memory("read", adapters["plain"], {"200 MB": parts.content()}, tmp_path)


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"))), "OMP_NUM_THREADS": "1"}


# Pickles and archives

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt", ".png")


def test_nothing_is_ever_executed(
    adapters: dict[str, bytes], models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    files = hostile_files(canary, adapters["plain"], picture_without_adapter(adapters["picture"]))
    assert len(files) >= 50
    live = 0
    for name, hostile in files.items():
        if hostile.detonate is not None:
            hostile.detonate(hostile.content)
            assert canary.exists(), f"{name} does nothing even when it is opened"
            canary.unlink()
            live += 1
    assert live >= 30
    base = tmp_path / "base"
    base.mkdir()
    findings = Findings(tmp_path)
    opened = []
    for name, hostile in files.items():
        for suffix in SUFFIXES:
            file = tmp_path / f"adapter{suffix}"
            file.write_bytes(hostile.content)
            for action in (
                lambda file=file: read_adapter(file),
                lambda file=file: read_header(file),
                lambda file=file: load_adapter(models, file, "hostile", on_mismatch="force"),
                lambda file=file: recognised([file]),
                lambda file=file: import_adapter(models, file, "hostile"),
                lambda file=file: check_adapters([AdapterChoice(file)], str(base)),
            ):
                findings.read += 1
                if not findings.refused(f"{name} as {suffix}", action):  # type: ignore[arg-type]
                    opened.append(f"{name} as {suffix}")
            assert not canary.exists(), f"{name} as {suffix} was executed"
            file.unlink()
    findings.check()
    assert not opened
    assert loaded_adapters(models) == []


# The command line


def _commands_on(file: Path) -> list[list[str]]:
    """Every command that reads one file and needs no base model for it."""
    return [[command, str(file)] for command in ("inspect", "verify") if command in COMMANDS]


@pytest.mark.parametrize("kind", ["random positions", "picture"])
def test_the_command_line_says_why_in_one_line(
    kind: str, adapters: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = adapters[kind]
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(good)
    for command in _commands_on(file):
        assert main(command) == 0
    capsys.readouterr()
    if kind == "picture":
        changes = [Mutant(*change, honest=False) for change in picture_changes(good, adapters["plain"])][::8]
    else:
        changes = [*_mutants(good, 15, seed=9)]
    findings = Findings(file)
    for mutant in changes:
        findings.read += 1
        file.write_bytes(mutant.content)
        accepted = not findings.refused(mutant.label, lambda: read_adapter(file))
        for command in _commands_on(file):
            code = main(command)
            out, err = capsys.readouterr()
            # A picture may carry two adapters, or none, and be shown all the same.
            assert code in ((0,) if accepted else (2,) if kind != "picture" else (0, 2)), (mutant.label, command, err)
            assert err.startswith("error: ") == (code == 2), (mutant.label, err)
            assert len(err.splitlines()) == (code == 2), (mutant.label, err)
            assert all(line.isprintable() for line in out.splitlines()), (mutant.label, out)
            (out + err).encode()
    findings.check()


def test_a_process_of_its_own_ends_with_code_2(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + b"{" + b"[" * 1000)
    for command in _commands_on(file)[:1]:
        result = subprocess.run(
            [sys.executable, "-m", "svft_diffusion", *command], capture_output=True, text=True, env=_environment()
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


# Files of other tools


def _foreign(models: Mapping[str, nn.Module], folder: Path) -> dict[str, bytes]:
    unet = models["unet"]
    weight = unet.get_submodule(LINEAR[0]).weight
    assert isinstance(weight, Tensor)
    official = OfficialSVFT.around(weight, pattern="banded", off_diag=1, seed=0)
    factors = lora_factors(unet, [LINEAR[0], CONV])
    up, down = factors[LINEAR[0]]
    name = f"unet.{LINEAR[0]}"
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {LINEAR[0]: 3}, "unet.use_rslora": False}
    deltas = svdiff_deltas(unet)
    return {
        "svdiff": written(folder / "svdiff", {key: deltas[key] for key in [*deltas][:3]}).read_bytes(),
        "svft": written(folder / "svft", svft_state({LINEAR[0]: official})).read_bytes(),
        "kohya": kohya_file(folder / "kohya", "lora_unet", factors, alpha=2.0).read_bytes(),
        "diffusers": written(
            folder / "diffusers",
            {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down},
            {"lora_adapter_metadata": json.dumps(settings), "format": "pt"},
        ).read_bytes(),
    }


FOREIGN_KINDS = ("svdiff", "svft", "kohya", "diffusers")


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_mutants_of_foreign_files(kind: str, count: int, models: dict[str, nn.Module], tmp_path: Path) -> None:
    good = _foreign(models, tmp_path)[kind]
    findings = Findings(tmp_path / "foreign.safetensors")
    untouched, before = _output(models), digest_of_base(models["unet"])
    for mutant in _mutants(good, count, seed=6):
        findings.read += 1
        findings.file.write_bytes(mutant.content)
        if not findings.refused(mutant.label, lambda: import_adapter(models, findings.file, "mutant")):
            findings.accepted += 1
            unload_adapter(models, "mutant")
        assert loaded_adapters(models) == [], mutant.label
    findings.check()
    assert 0 < findings.accepted < findings.read
    assert torch.equal(_output(models), untouched)
    assert digest_of_base(models["unet"]) == before


def _foreign_files_that_ask_for_much() -> dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]:
    """Good LoRAs with one thing more that is out of proportion."""

    def lora(
        up: Tensor | None = None, down: Tensor | None = None, name: str = f"unet.{LINEAR[0]}"
    ) -> dict[str, Tensor]:
        return {
            f"{name}.lora_B.weight": torch.ones(24, 3) if up is None else up,
            f"{name}.lora_A.weight": torch.ones(3, 24) if down is None else down,
        }

    def settings(**fields: object) -> dict[str, str]:
        return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in fields.items()})}

    tucker = {
        "lora_unet_x.lora_up.weight": torch.ones(1, 1, 1, 1),
        "lora_unet_x.lora_down.weight": torch.ones(1, 10_000, 1, 1),
        "lora_unet_x.lora_mid.weight": torch.ones(1, 1, 100, 100),
    }
    many = {name: torch.ones(1, 1) for index in range(3000) for name in lora(name=f"unet.x{index}")}
    wide = lora(torch.ones(1, 12_000), torch.ones(12_000, 1), "unet.x")
    return {
        "a rank of 12,000 in an unknown layer": (lora() | wide, None),
        "a rank of 12,000": (lora(torch.ones(24, 12_000), torch.ones(12_000, 24)), None),
        "a kernel of 10,000 pixels": (lora() | tucker, None),
        "alpha of 400 digits": (lora(), settings(lora_alpha=10**400)),
        "pattern of 400 digits": (lora(), settings(alpha_pattern={LINEAR[0]: 10**400})),
        "pattern that is no regular expression": (lora(), settings(alpha_pattern={"(": 1})),
        "pattern that takes for ever": (lora(), settings(alpha_pattern={"([a-z0-9_.]{1,9}){1,9}!": 1})),
        "settings of depth": (lora(), {"lora_adapter_metadata": '{"unet.x":' + "[" * 99_999 + "]" * 99_999 + "}"}),
        "3,000 unknown layers": (lora() | many, None),
    }


FOREIGN_THAT_ASK_FOR_MUCH = _foreign_files_that_ask_for_much()


@pytest.mark.parametrize("case", FOREIGN_THAT_ASK_FOR_MUCH)
def test_foreign_files_that_ask_for_much(case: str, models: dict[str, nn.Module], tmp_path: Path) -> None:
    tensors, metadata = FOREIGN_THAT_ASK_FOR_MUCH[case]
    findings = Findings(written(tmp_path / "foreign.safetensors", tensors, metadata))
    findings.read = 1
    if not findings.refused(case, lambda: import_adapter(models, findings.file, "mutant")):
        unload_adapter(models, "mutant")
    assert loaded_adapters(models) == []
    findings.check()


@on_linux
@pytest.mark.slow
def test_foreign_files_take_little_memory(adapters: dict[str, bytes], tmp_path: Path) -> None:
    cases = {
        label: written(tmp_path / "case", tensors, metadata).read_bytes()
        for label, (tensors, metadata) in FOREIGN_THAT_ASK_FOR_MUCH.items()
        if "for ever" not in label
    }
    _check_memory("import", adapters["plain"], cases, tmp_path)
