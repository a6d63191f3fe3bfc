"""The app's interface for programs: named endpoints, and the same as MCP tools."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ConfigDict, ValidationError, validate_call

from svft_diffusion.app.components.adapter_cards import chosen_adapters, with_card
from svft_diffusion.app.components.training_form import TrainingWishes
from svft_diffusion.app.context import QUEUE, AppContext, shows_user_errors
from svft_diffusion.app.drawing.prompt_tags import with_tags
from svft_diffusion.app.drawing.studio import PictureRequest
from svft_diffusion.app.jobs.training_jobs import Job
from svft_diffusion.app.offered_bases import OfferedBases
from svft_diffusion.app.serving.served import uploaded_file
from svft_diffusion.app.shelf.library import LibraryEntry, id_of
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.adapter_choice import sha256_of
from svft_diffusion.sampling.prompt_syntax import split_prompt

_MOST_SESSIONS = 10_000
_NO_UPLOADS = "upload the photos first: give each of them as handle_file(PATH) of gradio_client"


def add_endpoints(context: AppContext) -> None:
    """Add them to the page that is being built."""
    endpoints = Endpoints(context)
    gr.api(_endpoint(endpoints.generate), api_name="generate", concurrency_id=QUEUE, concurrency_limit=1)
    for handler in (
        endpoints.list_bases,
        endpoints.list_adapters,
        endpoints.set_weights,
        endpoints.start_training,
        endpoints.training_status,
        endpoints.stop_training,
    ):
        gr.api(_endpoint(handler), api_name=handler.__name__, concurrency_limit=None)


class Endpoints:
    """What the endpoints do. Their docstrings are what clients are shown."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._bases = OfferedBases(context.config)
        self._studio = context.studio
        self._library = context.library
        self._jobs = context.jobs
        self._weights = SessionWeights()

    def list_bases(self) -> list[str]:
        """The base models that can be used; the first is used where none is named."""
        return self._bases.labels

    def list_adapters(self, search: str = "", base: str = "") -> list[dict[str, Any]]:
        """The adapters of the library. "problem" is null for those that fit the base model.

        Args:
            search: words that a name, title, trigger or fact must have; empty for all adapters.
            base: one of list_bases; empty for the first.
        """
        base = self._bases.named(base)
        return [self._adapter_facts(entry, base) for entry in self._library.entries(search)]

    def set_weights(self, weights: dict[str, float], request: gr.Request) -> dict[str, float]:
        """Choose the adapters of this session and their weights, for all pictures that it generates from now on.

        Args:
            weights: weight, from -10 to 10, by an adapter's id or name; adapters that are not mentioned are off.
        """
        if not request.session_hash:
            raise UserError("this request belongs to no session; give the weights to generate instead")
        cards = self._cards(weights)
        self._weights.keep(request.session_hash, weights)
        return {card["name"]: card["weight"] for card in cards}

    def generate(
        self,
        prompt: str,
        request: gr.Request,
        weights: dict[str, float] | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_images: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        width: int | None = None,
        height: int | None = None,
        scheduler: str | None = None,
        base: str = "",
    ) -> list[dict[str, Any]]:
        """Generate pictures: a list with the seed and the file of each, which holds its settings, and whether the base
        model's safety checker has blacked it out.

        Args:
            prompt: what to draw; may hold adapters as <adapter:NAME:0.8>, in place of their weights here.
            weights: weight by an adapter's id or name; those of set_weights if left out.
            negative_prompt: what not to draw.
            seed: of the first picture; the next ones count up.
            num_images: from 1 to 16.
            num_inference_steps: denoising steps.
            guidance_scale: how closely to follow the prompt.
            width: in pixels; the base model's own if left out.
            height: in pixels; the base model's own if left out.
            scheduler: such as ddim; the base model's own if left out.
            base: one of list_bases; empty for the first.
        """
        base = self._bases.named(base)
        if weights is None:
            weights = self._weights.of(request.session_hash)
        plain_prompt, tags = split_prompt(prompt)
        cards = with_tags(self._cards(weights), tags, self._library)
        pictures = self._studio.generate_pictures(
            PictureRequest(
                base=base,
                prompt=plain_prompt,
                adapters=chosen_adapters(cards, self._library, base, self._studio.on_mismatch),
                negative_prompt=negative_prompt,
                seed=seed,
                num_images=num_images,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                width=width,
                height=height,
                scheduler=scheduler,
            )
        )
        return [
            {
                "seed": picture.seed,
                "image": gr.FileData(path=str(picture.path), mime_type="image/png").model_dump(),
                "blacked_out": picture.blacked_out,
            }
            for picture in pictures
        ]

    def start_training(
        self,
        name: str,
        photos: list[dict[str, Any]],
        class_word: str,
        trigger: str = "sks",
        speed: str = "balanced",
        base: str = "",
    ) -> dict[str, Any]:
        """Train an adapter on photos of a subject, now or when the trainings before it have ended.

        Args:
            name: what to call the training; empty for trigger and class word.
            photos: uploaded files, three to six of the subject in different surroundings, and captions in text files
                of the same names, if there are some.
            class_word: what kind of thing the subject is, such as dog.
            trigger: the rare word that will stand for the subject in prompts.
            speed: quick, balanced or thorough.
            base: one of list_bases; empty for the first.
        """
        base = self._bases.named(base)
        files = [uploaded_file(str(photo.get("path", ""))) for photo in photos]
        if None in files:
            raise UserError(_NO_UPLOADS)
        notes: list[str] = []
        wishes = TrainingWishes([str(file) for file in files], None, class_word, trigger, name, speed)
        with wishes.as_config(self._context, base, notes) as config:
            job = self._jobs.start(config, wishes.shown_name)
        return self._facts([self._jobs.get(job)])[0] | {"notes": notes}

    def training_status(self, id: str = "") -> list[dict[str, Any]]:
        """How far trainings are, the latest first. "state" is queued, running, finished, stopped or failed; "stage"
        is what one that runs is doing, with a count of "class_images" while they are drawn; "stopping" is true once
        its end was asked for; "adapter" is the id of what has been trained, as soon as there is one.

        Args:
            id: of one training; empty for all.
        """
        return self._facts([self._jobs.get(id)] if id else self._jobs.jobs())

    def stop_training(self, id: str) -> dict[str, Any]:
        """End a training after the step at hand, with its adapter saved; or take it out of the queue. Returns its
        status: it is "stopping" until the step has ended; out of the queue, its state is removed.

        Args:
            id: of the training.
        """
        job = self._jobs.get(id)
        self._jobs.stop(id)
        try:
            return self._facts([self._jobs.get(id)])[0]
        except UserError:  # it waited, and is gone
            return self._facts([job])[0] | {"state": "removed", "queue_position": None}

    def _cards(self, weights: Mapping[str, float]) -> list[dict[str, Any]]:
        """Cards for adapters by id or name, as the page has them."""
        cards: list[dict[str, Any]] = []
        for name, weight in weights.items():
            entry = self._entry(name)
            if any(card["id"] == entry.id for card in cards):
                raise UserError(f"{entry.name} is named twice; give it one weight")
            cards = with_card(cards, entry, weight)
        return cards

    def _entry(self, name: str) -> LibraryEntry:
        for entry in self._library.entries():
            if entry.id == name:
                return entry
        return self._library.by_name(name)

    def _adapter_facts(self, entry: LibraryEntry, base: str) -> dict[str, Any]:
        header = entry.header
        return {
            "id": entry.id,
            "name": entry.name,
            "title": header.title,
            "description": header.description,
            "trigger": header.trigger,
            "class_word": header.class_word,
            "method": header.method,
            "base": header.base.name,
            "suggested_strength": header.suggested_strength,
            "strength_range": list(header.strength_range),
            "bytes": entry.size,
            "problem": self._library.fits(entry, base),
        }

    def _facts(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        ids = {entry.file: entry.id for entry in self._library.entries()} if any(job.adapter for job in jobs) else {}
        return [
            {
                "id": job.id,
                "name": job.name,
                "base": base_display_name(job.base),
                "state": job.state,
                "stage": job.stage,
                "stopping": job.is_active and job.stop_asked,
                "class_images": None
                if job.class_images is None
                else dict(zip(("drawn", "total"), job.class_images, strict=True)),
                "step": job.step,
                "total_steps": job.total_steps,
                "eta_seconds": job.eta_seconds,
                "loss": job.losses[-1][1] if job.losses else None,
                "queue_position": job.queue_position,
                "adapter": None if job.adapter is None else ids.get(job.adapter) or _id_of_copy(job.adapter),
                "reason": job.reason,
            }
            for job in jobs
        ]


def _id_of_copy(adapter: Path) -> str | None:
    """The id of an adapter that the library lists under another path, where the same file lay before."""
    try:
        return id_of(sha256_of(adapter))
    except UserError:  # damaged, or gone in this moment
        return None


class SessionWeights:
    """Weights by session; those of sessions that were not heard of for longest are forgotten."""

    def __init__(self) -> None:
        self._by_session: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, session: str, weights: Mapping[str, float]) -> None:
        """Remember the weights of a session, in place of those before."""
        with self._lock:
            self._by_session[session] = dict(weights)
            self._by_session.move_to_end(session)
            while len(self._by_session) > _MOST_SESSIONS:
                self._by_session.popitem(last=False)

    def of(self, session: str | None) -> dict[str, float]:
        """The weights of a session; none if it has set none."""
        with self._lock:
            if session is None or session not in self._by_session:
                return {}
            self._by_session.move_to_end(session)
            return dict(self._by_session[session])


def _endpoint(handler: Callable[..., Any]) -> Callable[..., Any]:
    """``handler`` with its arguments checked by their types: Gradio passes on whatever a client sends."""
    validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(handler)

    signature = inspect.signature(handler, eval_str=True)
    # A problem is told of by the position of an argument, or by its name.
    names = {key: name for number, name in enumerate(signature.parameters) for key in (number, name)}

    @functools.wraps(handler)
    def checked(*arguments: Any) -> Any:
        try:
            return validated(*arguments)
        except ValidationError as error:
            problem = error.errors()[0]
            name = names.get(problem["loc"][0], "one argument too many")
            if name == "photos" and len(problem["loc"]) > 1:  # one of them is a path or an address
                raise UserError(_NO_UPLOADS) from None
            raise UserError(f"{name}: {problem['msg'].lower()}") from None

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return shows_user_errors(checked)
