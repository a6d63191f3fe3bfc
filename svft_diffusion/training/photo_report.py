"""What the user should see of the photos before training begins: notes on them, and the pixels that are trained on."""

from __future__ import annotations

from pathlib import Path

from svft_diffusion.data.contact_sheet import contact_sheet, write_contact_sheet
from svft_diffusion.data.photo_check import photo_notes
from svft_diffusion.training.run import Run

CONTACT_SHEET_FILE = "contact_sheet.png"


def notes_on_photos(run: Run) -> list[str]:
    """What is worth a second look about the photos of each subject; see `photo_notes`."""
    pictures = run.streams[0].pictures
    subjects = dict.fromkeys(picture.subject for picture in pictures)
    notes = []
    for subject in subjects:
        of_subject = [picture for picture in pictures if picture.subject == subject]
        place = f"{of_subject[0].path.parent}: " if len(subjects) > 1 else ""
        notes += [f"{place}{note}" for note in photo_notes(of_subject, run.cutter)]
    return notes


def write_photos(run: Run) -> Path:
    """Write ``contact_sheet.png`` into the output folder: all cuts that are kept, or those of the first pass."""
    sheet = contact_sheet(run.streams[0].pictures, run.cutter, all_variants=run.config.cache_latents)
    return write_contact_sheet(sheet, run.config.output_dir / CONTACT_SHEET_FILE)
