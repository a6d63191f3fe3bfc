"""Base models in one file: checkpoints in the layout of the code that a model was first published with.

Such a file holds weights alone. Settings, tokenizers and the scheduler come from a pipeline folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import safe_open

from svft_diffusion.errors import UserError

_SETTINGS = ("*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model")


def load_single_file(
    file: str, config_folder: str | Path | None, *, dtype: torch.dtype, local_files_only: bool = False
) -> DiffusionPipeline:
    """The pipeline in a checkpoint, without a safety checker, which no such file has.

    Args:
        config_folder: a pipeline folder; of its weights only those are read that the file lacks. Without it, the
            settings are fetched from the Hub, from where diffusers says that models of this build have them.

    Raises:
        UserError: the settings are not to be had.
        OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError: the file holds no
            such model, or is damaged.
    """
    if config_folder is None:
        repository = settings_on_the_hub(file)
        try:
            config_folder = snapshot_download(
                repository, allow_patterns=list(_SETTINGS), local_files_only=local_files_only
            )
        except OSError as problem:
            raise UserError(
                f"{Path(file).name} holds weights alone, and the settings of {repository} can't be fetched from the "
                "Hub: give a pipeline folder of this kind with --base_config"
            ) from problem
    folder = Path(config_folder).expanduser()
    class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    pipeline_class = getattr(diffusers, class_name)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ValueError(f"diffusers reads no single file as a {class_name}")
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # it warns of every model that it casts
    try:
        pipeline: DiffusionPipeline = pipeline_class.from_single_file(
            file, config=str(folder), torch_dtype=dtype, local_files_only=True, **left_out_components(folder)
        )
    except SingleFileComponentError as problem:
        # Its text goes on with lines of code.
        raise ValueError(str(problem).partition("\n")[0]) from problem
    finally:
        diffusers.logging.set_verbosity(verbosity)
    incomplete = [name for name, part in pipeline.components.items() if _has_empty_weights(part)]
    if incomplete:
        raise ValueError(f"the file lacks weights of the {incomplete[0]} that its settings ask for")
    if changes := _settings_in_the_file(file):
        pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes))
    return pipeline


def left_out_components(folder: str | Path) -> dict[str, None]:
    """Text encoders and tokenizers that a pipeline folder was saved without, such as SD 3's T5.

    diffusers wants to be told that they shall be None.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return {}
    components = json.loads(index.read_text(encoding="utf-8"))
    return {
        name: None
        for name, kind in components.items()
        if name.startswith(("text_encoder", "tokenizer")) and kind == [None, None]
    }


def settings_on_the_hub(file: str) -> str:
    """The repository that has the settings of a checkpoint's kind, by the names and shapes of its tensors.

    Raises:
        SafetensorError: the file is damaged.
    """
    with safe_open(file, framework="pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    repository: str = fetch_diffusers_config(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )["pretrained_model_name_or_path"]
    return repository


def _settings_in_the_file(file: str) -> dict[str, Any]:
    """What a checkpoint says of its noise, by the presence of tensors that are no weights; such as NoobAI-XL's.

    diffusers passes over them, so that a model of velocities would be taken for one of noise.
    """
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
    changes: dict[str, Any] = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        changes["rescale_betas_zero_snr"] = True
    return changes


def _has_empty_weights(part: object) -> bool:
    return isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters())
