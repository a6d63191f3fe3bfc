"""What mixed samples call the subjects: their names as the prompts of the training have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from svft_diffusion.data.buckets import Size
from svft_diffusion.data.cut_mix import LEFT, RIGHT, side_by_side_prompts
from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.subject_words import subject_words
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.token_words import trigger_and_class

Pair = tuple[int, int]
"""Numbers of the subjects on the left and on the right."""


@dataclass(frozen=True)
class NamedSpans:
    """A prompt and where in it the rare words of both its subjects are: (first character, the words)."""

    prompt: str
    left: tuple[int, str]
    right: tuple[int, str]


@dataclass(frozen=True)
class Mixing:
    """How the run's subjects are told apart in one prompt."""

    template: str
    names: list[str]  # of the subjects: "sks dog"
    triggers: list[str]  # the rare words that these begin with: "sks"
    class_names: list[str]  # of their classes: "dog"; empty without prior preservation

    @property
    def instance_prompts(self) -> dict[Pair, str]:
        """What is said of the photos of each pair."""
        return side_by_side_prompts(self.template, self.names)

    @property
    def class_prompts(self) -> dict[Pair, str]:
        """What is said of pictures of their classes."""
        return side_by_side_prompts(self.template, self.class_names)

    @property
    def prompts(self) -> list[str]:
        """Of all mixed samples."""
        return list(dict.fromkeys([*self.instance_prompts.values(), *self.class_prompts.values()]))

    def check_sizes(self, family: ModelFamily, sizes: Sequence[Size]) -> None:
        """Raise `UserError` if a base model can't encode halves of pictures of these sizes."""
        multiple = 2 * family.pixel_multiple
        for _, width in sizes:
            if width % multiple:
                raise UserError(
                    f"--cut_mix_unmix cuts pictures in halves: widths must be multiples of {multiple} with this base, "
                    f"got {width}"
                )

    def check_prompts(self, family: ModelFamily) -> None:
        """Raise `UserError` if a base model doesn't read the prompts to their end; it must know new tokens by then."""
        for prompt in self.prompts:
            if lost := family.truncated_text(prompt):
                raise UserError(
                    f"the text encoder does not read the end of {prompt!r}, {lost!r}; use a shorter --cut_mix_prompt"
                )

    def spans(self) -> list[NamedSpans]:
        """All prompts of photos with the places of their rare words."""
        return [self._spans(pair, prompt) for pair, prompt in self.instance_prompts.items()]

    def _spans(self, pair: Pair, prompt: str) -> NamedSpans:
        subjects = dict(zip((LEFT, RIGHT), pair, strict=True))
        starts: dict[str, tuple[int, str]] = {}
        written = 0
        for literal, side, _, _ in Formatter().parse(self.template):
            written += len(literal)
            if side is not None:
                starts[side] = (written, self.triggers[subjects[side]])
                written += len(self.names[subjects[side]])
        return NamedSpans(prompt, starts[LEFT], starts[RIGHT])


def mixing_of(config: TrainingConfig, subjects: Sequence[Subject]) -> Mixing | None:
    """How the subjects of a run are named side by side; None if they are not mixed.

    Raises:
        UserError: there is one subject, or a prompt names none, or two of them have the same name.
    """
    if not config.cut_mix_unmix:
        return None
    if len(subjects) < 2:
        raise UserError("--cut_mix_unmix needs two subjects or more in --concepts_list")
    names, triggers, class_names = [], [], []
    for number, subject in enumerate(subjects, 1):
        trigger, class_word = trigger_and_class(config, subject)
        if trigger is None:
            raise UserError(
                f"--cut_mix_unmix: the instance_prompt of subject {number}, {subject.instance_prompt!r}, names no "
                "subject that its class_prompt does not; give it a rare word, such as 'a photo of sks dog'"
            )
        triggers.append(trigger)
        names.append(" ".join(word for word in (trigger, class_word) if word))
        if names[-1] in names[:-1]:
            raise UserError(f"--cut_mix_unmix: two subjects are called {names[-1]!r}; give each its own rare word")
        if config.with_prior_preservation:
            class_name, _ = subject_words(subject.class_prompt, None)
            if class_name is None:
                raise UserError(
                    f"--cut_mix_unmix: the class_prompt of subject {number}, {subject.class_prompt!r}, names no class; "
                    "write it as 'a photo of a dog'"
                )
            class_names.append(class_name)
    return Mixing(config.cut_mix_prompt, names, triggers, class_names)
