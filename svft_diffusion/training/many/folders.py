"""Folders that several rows use: photos are only read, and class pictures serve all that draw the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from svft_diffusion.training.checks import Inputs
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.many.listing import Row

# What class pictures follow from, beside their prompts and the base model.
_RECIPE = (
    "seed", "resolution", "prior_generation_num_inference_steps", "prior_generation_guidance_scale",
    "prior_generation_precision",
)  # fmt: skip


@dataclass
class SharedFolders:
    """Collects what rows read and write, and says where they would get into each other's way."""

    _recipes: dict[Path, tuple[Row, dict[str, object]]] = field(default_factory=dict)
    _read: dict[Path, Row] = field(default_factory=dict)
    _written: dict[Path, tuple[Row, str]] = field(default_factory=dict)
    _problems: list[str] = field(default_factory=list)

    def add(self, row: Row, config: TrainingConfig, inputs: Inputs) -> None:
        """Take in a row that `check` has accepted."""
        for picture in inputs.instance_pictures:
            self._read.setdefault(picture.path.parent.resolve(), row)
        self._written[config.output_dir.resolve()] = (row, "its own folder")
        if config.encoding_cache is not None:
            self._written.setdefault(config.encoding_cache.resolve(), (row, "encoding_cache"))
        for subject in inputs.subjects:
            if subject.class_data_dir is None or config.prior_source != "images":
                continue
            folder = subject.class_data_dir.resolve()
            self._written.setdefault(folder, (row, "class_data_dir"))
            recipe = {"class_prompt": subject.class_prompts, **{name: getattr(config, name) for name in _RECIPE}}
            other, known = self._recipes.setdefault(folder, (row, recipe))
            if differing := [name for name in recipe if recipe[name] != known[name]]:
                self._problems.append(
                    f"{row}: draws class pictures into {subject.class_data_dir} with another {differing[0]} than "
                    f"{other}, so that each would remove the other's; give it another class_data_dir"
                )

    def problems(self) -> list[str]:
        """A line for each."""
        mixing = [
            f"{row}: {name} is the folder of the photos of {self._read[folder]}, which would mix; use another"
            for folder, (row, name) in self._written.items()
            if folder in self._read
        ]
        return self._problems + mixing
