"""What makes steps faster or smaller and changes nothing that they learn: attention, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig


def choose_speed(config: TrainingConfig, pipeline: DiffusionPipeline, models: Mapping[str, nn.Module]) -> None:
    """Set up the models that train as the settings say.

    Args:
        models: with their adapters.

    Raises:
        UserError: xformers does not work here.
    """
    if config.enable_xformers_memory_efficient_attention:
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, NotImplementedError) as problem:
            raise UserError(f"--enable_xformers_memory_efficient_attention does not work here: {problem}") from problem
    if config.gradient_checkpointing:
        for model in models.values():
            if isinstance(model, ModelMixin):
                model.enable_gradient_checkpointing()
            elif isinstance(model, PreTrainedModel):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # transformers checkpoints only what is in training mode
    if config.torch_compile:
        for model in models.values():
            if isinstance(model, ModelMixin):
                compile_blocks(model)


def compile_blocks(model: ModelMixin) -> None:
    """Compile the blocks that a denoiser repeats, in place; the whole of one that names none."""
    if model._repeated_blocks:
        model.compile_repeated_blocks()
    else:
        model.compile()


@contextmanager
def compilation_explained(config: TrainingConfig) -> Iterator[None]:
    """Turn a failure to compile inside into one line; it comes as late as the first step.

    Raises:
        UserError: in the place of torch's exception.
    """
    if not config.torch_compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        yield
    except TorchDynamoException as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise UserError(f"--torch_compile does not work here ({reason}); leave it out") from problem


def attention_in_words(models: Mapping[str, nn.Module]) -> str:
    """What computes the attention of each model, read from the models: ``unet SDPA, text_encoder SDPA``."""
    return ", ".join(f"{component} {_attention_of(model)}" for component, model in models.items())


def _attention_of(model: nn.Module) -> str:
    if isinstance(model, PreTrainedModel):
        names = {str(model.config._attn_implementation)}
    else:
        processors = (module.processor for module in model.modules() if hasattr(module, "processor"))
        names = {_processor_in_words(processor) for processor in processors}
    return " and ".join(sorted(name.replace("sdpa", "SDPA") for name in names)) or "none"


def _processor_in_words(processor: object) -> str:
    name = type(processor).__name__
    if "XFormers" in name:
        return "xformers"
    # Diffusers' newer processors leave the choice to a backend, which is None for torch's own.
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        return str(getattr(backend, "value", backend))
    return "plain" if name in ("AttnProcessor", "SlicedAttnProcessor") else "SDPA"
