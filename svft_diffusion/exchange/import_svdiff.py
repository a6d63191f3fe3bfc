"""SVDiff as the community package svdiff-pytorch writes it: ``spectral_shifts.safetensors`` and ``.._te``.

A file holds ``<module path>.delta`` for one model and nothing else: a shift for each singular value of linear layers,
convolutions (as c_out x rest) and embeddings, and one number for a norm. Versions 0.1 have no norms and no text
encoder. At strength ``s`` the package rebuilds ``U relu(S + s delta) V^T``, and for a norm
``w relu(||w|| + s delta) / ||w||``: exactly what method ``svdiff`` with scalar norm shifts does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from svft_diffusion.exchange.base_layers import BaseLayer, base_layers, layers_of_file
from svft_diffusion.exchange.conversion import Conversion, ConvertedLayer, Format, ProjectionOptions
from svft_diffusion.exchange.foreign_file import ForeignFile
from svft_diffusion.files.tensor_names import tensor_name

_ENDING = ".delta"


def _recognises(file: ForeignFile) -> bool:
    return all(name.endswith(_ENDING) and len(shape) == 1 for name, shape in file.shapes.items())


def _convert(
    files: Sequence[ForeignFile], components: Mapping[str, nn.Module], options: ProjectionOptions
) -> Conversion:
    known = base_layers(components)
    tensors, reports = {}, []
    taken: set[str] = set()
    any_norm = False
    for file in files:
        names = {name.removesuffix(_ENDING): name for name in file.shapes}

        def misfit(path: str, layer: BaseLayer, file: ForeignFile = file) -> str | None:
            held, needed = file.shapes[path + _ENDING][0], _number_of_shifts(layer)
            return None if held == needed else f"takes {needed} shifts, the file has {held}"

        layers = layers_of_file(file, known, names, misfit, taken)
        deltas = file.tensors(file.shapes)
        for path, layer in layers.items():
            delta = deltas[names[path]].float()
            tensors[tensor_name(layer.canonical, "norm" if layer.kind == "norm" else "values")] = delta
            reports.append(ConvertedLayer(layer.canonical, float(delta.norm()), 0.0))
            any_norm = any_norm or layer.kind == "norm"
            taken.add(layer.component)
    return Conversion({"method": "svdiff", "norm_shift": "scalar", "train_norm": any_norm}, tensors, reports)


def _number_of_shifts(layer: BaseLayer) -> int:
    return 1 if layer.kind == "norm" else min(layer.matrix_shape)


SVDIFF = Format("SVDiff (svdiff-pytorch)", _recognises, _convert, projects=False)
