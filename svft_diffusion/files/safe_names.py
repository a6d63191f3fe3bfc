"""Names of files from text of others: fit for a folder on any system, and leading nowhere else."""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 80  # bytes: file systems take 255, with an ending and a number
# Names of devices on Windows, whatever follows the dot.
_RESERVED = {
    *("CON", "PRN", "AUX", "NUL", "CONIN", "CONOUT", "CLOCK"),
    *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10)),
}


def safe_file_stem(label: str) -> str:
    """``label``, any text, as the name of a file without its ending: letters, digits, ``_`` and ``-`` alone.

    What stands before the last slash or backslash, and the ending of an adapter or picture, is left out. Characters
    that some systems take for others, such as the wide slash, are made the plain ones first.
    """
    plain = re.split(r"[\\/]", unicodedata.normalize("NFKC", label))[-1]
    plain = re.sub(r"\.(safetensors|png)$", "", plain, flags=re.IGNORECASE)
    return safe_name(plain)


def safe_name(label: str) -> str:
    """`safe_file_stem` of a name that has neither folders nor an ending: dots and slashes in it become ``_``."""
    plain = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFKC", label))
    plain = plain.encode()[:_LONGEST].decode("utf-8", "ignore").strip("_-") or "adapter"
    return f"{plain}_adapter" if plain.upper() in _RESERVED else plain
