"""Makes the tuner known to PEFT, which has no public way for methods from outside.

PEFT keeps its methods in plain dicts keyed by an enum of strings; a member of another string enum with its own value
is an equally good key.
"""

from __future__ import annotations

from enum import Enum

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner


class SpectralPeftType(str, Enum):  # noqa: UP042 - PEFT compares and formats its own members as (str, Enum)
    """PEFT's name for adapters in the singular-value space."""

    SPECTRAL = "SPECTRAL"


PREFIX = "spectral_"


def register(config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Insert config, tuner and prefix into PEFT's registry; a second call changes nothing.

    Raises:
        ImportError: the installed PEFT has no such registry.
    """
    try:
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
        )
    except ImportError as problem:
        from importlib.metadata import version

        raise ImportError(
            f"svft_diffusion can't register its adapters with peft {version('peft')}: the registry has moved; "
            "install peft>=0.21,<0.22"
        ) from problem
    key = SpectralPeftType.SPECTRAL
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = PREFIX
