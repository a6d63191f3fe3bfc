"""What the tabs of the page are given."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import gradio as gr

from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.drawing.studio import Studio
from svft_diffusion.app.jobs.training_jobs import TrainingJobs
from svft_diffusion.app.shelf.library import Library
from svft_diffusion.errors import UserError

Handler = TypeVar("Handler", bound=Callable[..., Any])

# Events that use the pipeline wait for each other in one queue, where visitors see their position.
QUEUE = "pipeline"


@dataclass(frozen=True)
class AppContext:
    """What all visitors share."""

    config: AppConfig
    studio: Studio
    library: Library
    jobs: TrainingJobs


@dataclass(frozen=True)
class Shared:
    """Components that more than one tab reads or writes.

    Attributes:
        tabs: with the ids ``generate``, ``blend``, ``train``, ``library`` and ``compare``.
        base: name of the visitor's base model.
        cards: the visitor's adapters and their weights, see `components.adapter_cards`; Generate places them.
        changes: what the server changes on the cards, see `components.card_changes`.
        tab: the one that is being placed; a visitor comes to it with its ``select``.
    """

    tabs: gr.Tabs
    base: gr.State
    cards: gr.HTML
    changes: gr.HTML
    tab: gr.Tab


def shows_user_errors(handler: Handler) -> Handler:
    """Turn a user's error into a notice on the page, without a trace; for generators, too. Of other errors the notice
    tells the kind, and the terminal the rest."""
    if isgeneratorfunction(handler):

        @functools.wraps(handler)
        def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
            with _notices():
                yield from handler(*arguments, **named)

        return steps  # type: ignore[return-value]

    @functools.wraps(handler)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with _notices():
            return handler(*arguments, **named)

    return wrapped  # type: ignore[return-value]


@contextmanager
def _notices() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # The notice is shown as HTML, and the message may quote a file's name.
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(f"something went wrong ({type(error).__name__}); the app's terminal has the details") from error
