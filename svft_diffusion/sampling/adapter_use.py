"""How an adapter acts while a picture is drawn: its weight, its course over the steps, and its region."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import COMPONENTS
from svft_diffusion.sampling.regions import Region, parse_region, region_to_json
from svft_diffusion.sampling.step_schedule import StepSchedule, parse_schedule
from svft_diffusion.sampling.weight_text import COMPONENT_LABELS

_FIELDS = ("weight", "schedule", "region")


@dataclass(frozen=True)
class AdapterUse:
    """What `acting_adapters` does with one adapter; see `svft_diffusion.adapters.set_adapters` for weights."""

    weight: AdapterWeight = 1.0
    schedule: StepSchedule | None = None
    region: Region | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `set_adapters` alone does all of it."""
        return self.schedule is None and self.region is None


def parse_use(value: object) -> AdapterUse:
    """A use from what YAML and JSON hold.

    A number is a weight, and so is a mapping of components (``{"unet": 0.5, "te": 0}``) or of blocks in them. With a
    schedule or a region it is ``{"weight": 0.8, "schedule": {"ramp_in": 0.3}, "region": [0, 0, 0.5, 1]}``.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, Mapping) and value.keys() & set(_FIELDS):
        if unknown := value.keys() - set(_FIELDS):
            raise UserError(
                f"an adapter has no {sorted(map(str, unknown))[0]!r} here; its fields are {', '.join(_FIELDS)}"
            )
        schedule, region = value.get("schedule"), value.get("region")
        return AdapterUse(
            parse_weight(value.get("weight", 1.0)),
            None if schedule is None else parse_schedule(schedule),
            None if region is None else parse_region(region),
        )
    return AdapterUse(parse_weight(value))


def parse_weight(value: object) -> AdapterWeight:
    """A number, or numbers by component and block, where components may be called as on the command line.

    Raises:
        UserError: anything else.
    """
    if not isinstance(value, Mapping):
        return _number(value)
    weights: dict[str, float | dict[str, float]] = {}
    for label, part in value.items():
        component = COMPONENT_LABELS.get(label, label)
        if component not in COMPONENTS:
            raise UserError(f"no component {label!r}; choose from {', '.join(COMPONENT_LABELS)}")
        if component in weights:
            raise UserError(f"{label} has two weights")
        is_blocks = isinstance(part, Mapping)
        weights[component] = {str(block): _number(part[block]) for block in part} if is_blocks else _number(part)
    return weights


def use_to_json(use: AdapterUse) -> object:
    """What `parse_use` makes the same use of: as short as it can be."""
    if use.is_plain:
        return use.weight
    fields = {
        "weight": use.weight,
        "schedule": None if use.schedule is None else str(use.schedule),
        "region": None if use.region is None else region_to_json(use.region),
    }
    return {name: value for name, value in fields.items() if value is not None}


def use_in_picture(use: AdapterUse) -> object:
    """As `use_to_json`, for the settings in a picture's file: a mask by its name and content, and not by its folder.

    Raises:
        UserError: the mask can't be read.
    """
    value = use_to_json(use)
    if use.region is None or use.region.mask is None:
        return value
    assert isinstance(value, dict)
    try:
        digest = hashlib.sha256(use.region.mask.read_bytes()).hexdigest()
    except OSError as problem:
        raise UserError(f"the mask {use.region.mask} can't be read: {problem.strerror or problem}") from problem
    region = {**region_to_json(use.region), "mask": use.region.mask.name, "mask_sha256": digest}
    return {**value, "region": region}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e4 < value < 1e4:
        raise UserError(f"a weight must be a number between -10000 and 10000, got {value!r}")
    return float(value) + 0.0  # adding zero turns a negative zero into zero
