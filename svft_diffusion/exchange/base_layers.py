"""The layers of a base model as files of other tools name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from svft_diffusion.adapters import SVFTConfig
from svft_diffusion.adapters.layers import Kind, matrix_of
from svft_diffusion.adapters.targets import adaptable_layers
from svft_diffusion.adapters.tuner import prepare_layers
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.foreign_file import ForeignFile
from svft_diffusion.files.names import base_module, canonical_name, split_canonical_name
from svft_diffusion.spectral import SingularFactors


@dataclass(frozen=True)
class BaseLayer:
    """A layer of a pipeline that an adapter can go around."""

    component: str
    path: str  # in the model at hand
    canonical: str  # as adapter files name it, with the component
    kind: Kind
    weight: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, n)`` of the weight as a matrix that acts on column vectors."""
        rows, columns = matrix_of(self.kind, self.weight).shape
        return rows, columns

    @property
    def spellings(self) -> list[str]:
        """Paths that name this layer in one version of the libraries or another."""
        return list(dict.fromkeys((self.path, split_canonical_name(self.canonical)[1])))


def base_layers(components: Mapping[str, nn.Module]) -> dict[str, dict[str, BaseLayer]]:
    """Component -> every spelling of a layer's path -> the layer."""
    found: dict[str, dict[str, BaseLayer]] = {}
    for component, model in components.items():
        found[component] = {}
        for path, kind in adaptable_layers(model).items():
            weight = base_module(model.get_submodule(path)).weight
            assert isinstance(weight, Tensor)
            layer = BaseLayer(component, path, canonical_name(component, model, path), kind, weight)
            found[component] |= dict.fromkeys(layer.spellings, layer)
    return found


def layers_of_file(
    file: ForeignFile,
    layers: Mapping[str, Mapping[str, BaseLayer]],
    paths: Iterable[str],
    misfit: Callable[[str, BaseLayer], str | None],
    taken: Iterable[str] = (),
) -> dict[str, BaseLayer]:
    """The layers that a file without component names means: those of the component that all of them fit.

    Args:
        layers: from `base_layers`.
        paths: what the file calls its layers.
        misfit: says how a path's tensors don't fit a layer, or None where they do.
        taken: components that other files belong to.

    Raises:
        UserError: no free component has all the layers, in these sizes.
    """
    paths = list(paths)
    problems: dict[str, list[str]] = {}
    for component, by_path in layers.items():
        if component in taken:
            continue
        problems[component] = []
        for path in paths:
            if path not in by_path:
                problems[component].append(f"there is no layer {path}")
            elif problem := misfit(path, by_path[path]):
                problems[component].append(f"layer {path} {problem}")
    if not problems:
        raise UserError(f"{file.name}: the base has no component left that it could belong to")
    nearest = min(problems, key=lambda component: len(problems[component]))
    if problems[nearest]:
        raise UserError(
            f"{file.name} was made for another base: {len(problems[nearest])} of its {len(paths)} layers do not fit "
            f"the {nearest}; {problems[nearest][0]}"
        )
    found = {path: layers[nearest][path] for path in paths}
    if len({layer.canonical for layer in found.values()}) < len(found):
        raise UserError(f"{file.name} names a layer twice, with and without the level text_model")
    return found


def factors_of_layers(components: Mapping[str, nn.Module], layers: Iterable[BaseLayer]) -> dict[str, SingularFactors]:
    """Singular factors by canonical name, those that an adapter added now would stand on.

    Raises:
        UserError: a layer can't carry an adapter.
    """
    by_component: dict[str, dict[str, str]] = {}
    for layer in layers:
        by_component.setdefault(layer.component, {})[layer.path] = layer.canonical
    found = {}
    for component, canonical in by_component.items():
        for path, prepared in prepare_layers(components[component], list(canonical), SVFTConfig()).items():
            assert prepared.factors is not None
            found[canonical[path]] = prepared.factors
    return found
