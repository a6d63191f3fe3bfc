"""Settings of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.comparison.measuring import Effort
from svft_diffusion.comparison.questions import QUESTIONS
from svft_diffusion.errors import UserError
from svft_diffusion.settings import setting, settings_of

_WHO, _EFFORT, _SEARCH, _WORK = "who is compared", "how long and on what", "learning rates", "the work"


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, and how thoroughly. Subjects and judges are those of the embedded model."""

    question: str = setting(
        "methods", "methods: all, ours and PEFT's; the others are what papers leave open", group=_WHO,
        choices=tuple(QUESTIONS),
    )  # fmt: skip
    methods: list[str] = setting([], "only these of the question, by their names in the report", group=_WHO)
    budget: int = setting(232_000, "bytes that each method may store, without names and header", group=_WHO)
    second_budget: int | None = setting(116_000, "another budget, for the best few of the first", group=_WHO)
    second_best: int = setting(4, "how many those are", group=_WHO)
    targets: str = setting(DEFAULT_PRESET, "layers that train", group=_WHO, choices=tuple(PRESETS))

    num_subjects: int = setting(8, "subjects", group=_EFFORT)
    num_seeds: int = setting(3, "training runs for each subject", group=_EFFORT)
    max_train_steps: int = setting(150, "optimizer steps", group=_EFFORT)
    train_batch_size: int = setting(4, "photos in a batch, and as many class pictures", group=_EFFORT)
    num_class_images: int = setting(26, "class pictures", group=_EFFORT)
    num_images: int = setting(1, "pictures of each of the six scenes that are judged", group=_EFFORT)
    num_inference_steps: int = setting(20, "denoising steps of those", group=_EFFORT)
    guidance_scale: float = setting(4.0, "guidance of those", group=_EFFORT)

    lr_factors: list[float] = setting(
        [0.3, 1.0, 3.0], "everybody's learning rates to try, as multiples of its usual one", group=_SEARCH
    )
    lr_extensions: int = setting(
        2, "while the best rate is the first or the last, try so many beyond, alike for everybody", group=_SEARCH
    )
    search_subjects: int = setting(2, "other subjects that they are tried on", group=_SEARCH)
    lr_finalists: int = setting(3, "how many of the best rates are tried on more subjects", group=_SEARCH)
    final_search_subjects: int = setting(6, "on so many in all; the best there is taken", group=_SEARCH)

    output_dir: Path = setting(Path("outputs/comparison"), "rows and report; the same again goes on", group=_WORK)
    max_hours: float | None = setting(None, "begin no more rows after so many hours", group=_WORK)
    threads: int = setting(1, "CPU threads", group=_WORK)
    any_code: bool = setting(False, "take rows that another version of this program's code measured, too", group=_WORK)
    dry_run: bool = setting(False, "say how many rows are left and how long they take, from one measured", group=_WORK)

    @property
    def effort(self) -> Effort:
        """What a row depends on."""
        return Effort(
            steps=self.max_train_steps,
            batch_size=self.train_batch_size,
            class_images=self.num_class_images,
            targets=self.targets,
            pictures=self.num_images,
            inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )


_AT_LEAST_ONE = (
    "budget", "second_budget", "num_subjects", "num_seeds", "max_train_steps", "train_batch_size", "num_class_images",
    "num_images", "num_inference_steps", "search_subjects", "lr_finalists",
    "final_search_subjects", "threads",
)  # fmt: skip
_AT_LEAST_ZERO = ("second_best", "lr_extensions", "guidance_scale")
_MOST_SUBJECTS = 100  # from there on they are those of the search


def check_config(config: CompareConfig) -> None:
    """Raise `UserError` for values that can't work."""
    for item in settings_of(CompareConfig):
        item.convert(getattr(config, item.name))
    for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            value = getattr(config, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
    if config.num_subjects > _MOST_SUBJECTS:
        raise UserError(f"--num_subjects: there are {_MOST_SUBJECTS} to compare on, got {config.num_subjects}")
    if config.max_hours is not None and not config.max_hours > 0:
        raise UserError(f"--max_hours must be above 0, got {config.max_hours:g}")
    factors = config.lr_factors
    if not factors or any(not 0 < factor < float("inf") for factor in factors) or sorted(set(factors)) != factors:
        raise UserError(
            f"--lr_factors must be numbers above 0 that rise, got {' '.join(f'{one:g}' for one in factors)}"
        )
    if config.final_search_subjects < config.search_subjects:
        raise UserError(
            f"--final_search_subjects must be at least --search_subjects, {config.search_subjects}; "
            f"got {config.final_search_subjects}"
        )
    if len(factors) == 1 and config.lr_extensions:
        raise UserError(
            "--lr_extensions go on by the distance of two --lr_factors, and there is one; give 0 extensions"
        )
