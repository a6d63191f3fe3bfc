"""``--dry_run`` for many subjects: two steps of the first, and what they say of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from svft_diffusion.training.dry_run import DryRun, dry_run
from svft_diffusion.training.many.listing import Row
from svft_diffusion.training.subjects import read_subjects


@dataclass(frozen=True)
class Estimate:
    """What all rows would need in one process, if they are like the first but for their steps."""

    subjects: int
    steps: int  # of all rows
    total_seconds: float
    adapter_bytes: int  # of all rows
    first: DryRun

    def to_mapping(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "first": self.first.to_mapping()}

    def in_words(self) -> str:
        """Some lines for a terminal."""
        hours, minutes = divmod(round(self.total_seconds / 60), 60)
        return (
            f"the first of {self.subjects} subjects:\n{self.first.in_words()}\n\n"
            f"all {self.subjects} in one process, if they are like the first: {self.steps:,} steps, about "
            f"{f'{hours} h {minutes} min' if hours else f'{self.total_seconds / 60:.1f} min'}, adapters of "
            f"{self.adapter_bytes / 1000:,.1f} kB; n processes need an n-th of the time"
        )


def estimate(rows: Sequence[Row]) -> Estimate:
    """Two steps of the first row, multiplied: steps by those of every row, pictures by the number of rows.

    The time to start counts once: what it goes for, loading and decompositions, is shared.

    Raises:
        UserError: as of `dry_run`.
    """
    steps = []
    for row in rows:
        subjects, _ = read_subjects(row.config)
        steps.append(row.config.steps(sum(len(subject.pictures) for subject in subjects)))
    # A row may have begun already, and a dry run is refused where there is something.
    first = dry_run(dataclasses.replace(rows[0].config, output_dir=rows[0].config.output_dir.with_name(".dry-run")))
    of_pictures = first.class_images * first.seconds_per_class_image + first.samples * first.seconds_per_sample
    return Estimate(
        subjects=len(rows),
        steps=sum(steps),
        total_seconds=first.seconds_to_start + sum(steps) * first.seconds_per_step + len(rows) * of_pictures,
        adapter_bytes=len(rows) * first.adapter_bytes,
        first=first,
    )
