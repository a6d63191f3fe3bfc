"""The base models that the page and the API offer, by names that tell nothing of where they lie."""

from __future__ import annotations

from svft_diffusion.app.config import AppConfig
from svft_diffusion.models.loading import base_display_name


class OfferedBases:
    """The base models of the page by what visitors call them."""

    def __init__(self, config: AppConfig) -> None:
        self._config = config
        self._by_label: dict[str, str] = {}
        for base in config.bases:
            name = label = base_display_name(base)
            number = 2
            while label in self._by_label:
                label, number = f"{name} ({number})", number + 1
            self._by_label[label] = base

    @property
    def labels(self) -> list[str]:
        return list(self._by_label)

    def label(self, base: str) -> str:
        """What the page calls a base model."""
        return next((label for label, offered in self._by_label.items() if offered == base), base)

    def named(self, text: str) -> str:
        """The base model that a visitor chose or typed.

        Raises:
            UserError: it is not offered, and the page is open to others.
        """
        return self._by_label.get(text.strip()) or self._config.offered_base(text)
