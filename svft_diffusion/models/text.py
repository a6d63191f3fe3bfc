"""How much of a prompt the text encoders of a pipeline read."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from transformers import T5EncoderModel

from svft_diffusion.errors import UserError

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_LONGEST_SEQUENCE = 512  # of diffusers' pipelines


class TextReader(NamedTuple):
    """What turns prompts into the input of one text encoder."""

    tokenizer: Any
    length: int  # tokens, those for start and end among them


def text_readers(pipeline: DiffusionPipeline, max_sequence_length: int | None = None) -> dict[str, TextReader]:
    """The readers of a pipeline by text encoder; one that is not loaded has none.

    Args:
        max_sequence_length: tokens that T5 reads (default: as many as when the pipeline draws).
    """
    readers = {}
    for component, name in _TOKENIZERS.items():
        text_encoder, tokenizer = getattr(pipeline, component, None), getattr(pipeline, name, None)
        if text_encoder is None or tokenizer is None:
            continue
        if isinstance(text_encoder, T5EncoderModel):
            length = sequence_length(pipeline, max_sequence_length)
        else:
            length = tokenizer.model_max_length
        readers[component] = TextReader(tokenizer, length)
    return readers


def has_text_encoders(pipeline: DiffusionPipeline, *text_encoders: str) -> bool:
    """Whether the pipeline has all these text encoders, and a tokenizer for each."""
    return set(text_encoders) <= text_readers(pipeline).keys()


def sequence_length(pipeline: DiffusionPipeline, wanted: int | None = None) -> int:
    """Tokens that the T5 encoder of a pipeline reads: ``wanted``, or as many as when the pipeline draws.

    Raises:
        UserError: more than the pipeline takes.
    """
    if wanted is None:
        return int(inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default)
    if not 1 <= wanted <= _LONGEST_SEQUENCE:
        raise UserError(f"--max_sequence_length must be from 1 to {_LONGEST_SEQUENCE}, got {wanted}")
    return wanted


def truncated_text(pipeline: DiffusionPipeline, prompt: str, max_sequence_length: int | None = None) -> str:
    """The end of a prompt that none of the pipeline's text encoders reads, or nothing."""
    ends = []
    for tokenizer, length in text_readers(pipeline, max_sequence_length).values():
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        places = length - tokenizer.num_special_tokens_to_add()
        ends.append(tokenizer.decode(ids[places:]).strip())
    return min(ends, key=len, default="")
