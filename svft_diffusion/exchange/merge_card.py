"""What a merged pipeline says of itself: the card of a folder, the header entries of a single file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml
from diffusers import DiffusionPipeline

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.files import AdapterHeader
from svft_diffusion.files.model_spec import MODEL_SPEC, base_version, model_config
from svft_diffusion.markdown import code_block, plain, table
from svft_diffusion.terminal import printable

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # whose names of layers the file follows


@dataclass(frozen=True)
class Ingredient:
    """An adapter that was merged; no folder of this machine."""

    file_name: str
    sha256: str
    weight: AdapterWeight
    header: AdapterHeader

    @property
    def title(self) -> str:
        """What a person calls the adapter, on one line."""
        return printable(self.header.title or self.file_name)

    def to_json(self) -> dict[str, object]:
        """As plain values; what the adapter doesn't say is left out."""
        weight = self.weight if isinstance(self.weight, int | float) else dict(self.weight)
        said = {"trigger": self.header.trigger, "instance_prompt": self.header.instance_prompt}
        return {
            "file": self.file_name,
            "weight": weight,
            "method": self.header.method,
            **{name: text for name, text in said.items() if text},
            "sha256": self.sha256,
        }


def merged_card(base_name: str, ingredients: Sequence[Ingredient], *, hub_name: str | None = None) -> str:
    """``README.md`` of a merged folder, with the Hub's front matter.

    Args:
        base_name: for people.
        hub_name: the base's name on the Hub, where it is there.
    """
    prompts = _prompts(ingredients)
    front_matter: dict[str, object] = {
        **({} if hub_name is None else {"base_model": hub_name, "base_model_relation": "merge"}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "svft-diffusion", *_unique(item.header.method for item in ingredients)],
        "merged_from": [item.to_json() for item in ingredients],
    }
    if prompts:
        front_matter["instance_prompt"] = prompts[0]
    rows = ([plain(item.title), _weight_text(item.weight), item.header.method] for item in ingredients)
    base = plain(base_name)
    parts = [
        f"# {base} with {', '.join(plain(item.title) for item in ingredients)}",
        f"The weights of {base} with these adapters in them. Nothing but diffusers is needed to load it.",
        table(["adapter", "weight", "method"], rows),
        "Prompts of the training:\n\n" + "\n".join(f"* {plain(prompt)}" for prompt in prompts) if prompts else "",
        code_block(
            "python",
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
            f"image = pipe({(prompts[0] if prompts else 'a photo')!r}).images[0]",
        ),
        f"The licence is that of {base}. The people and things in the training photos may not be yours to draw: "
        "ask before you share.",
    ]
    header = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def merged_metadata(
    pipeline: DiffusionPipeline, title: str, base_name: str, ingredients: Sequence[Ingredient]
) -> dict[str, str]:
    """ModelSpec's entries for a single file."""
    metadata = {
        "modelspec.sai_model_spec": MODEL_SPEC,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join([base_name, *(item.file_name for item in ingredients)]),
        "svft_diffusion.merged_from": json.dumps([item.to_json() for item in ingredients], sort_keys=True),
    }
    triggers = _unique(item.header.trigger for item in ingredients if item.header.trigger)
    if triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(triggers)
    prediction = model_config(pipeline, "scheduler").get("prediction_type")
    if prediction in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = prediction.removesuffix("_prediction")
    version = base_version(pipeline)
    if version is not None:
        metadata |= {"modelspec.architecture": version.architecture, "modelspec.resolution": version.resolution}
    return {key: printable(text) for key, text in metadata.items()}  # file names may hold bytes that are no text


def _prompts(ingredients: Sequence[Ingredient]) -> list[str]:
    prompts = (item.header.instance_prompt or item.header.trigger for item in ingredients)
    return _unique(printable(prompt) for prompt in prompts if prompt)


def _weight_text(weight: AdapterWeight) -> str:
    if isinstance(weight, Mapping):
        return ", ".join(f"{component} {value}" for component, value in weight.items())
    return f"{weight:g}"


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
