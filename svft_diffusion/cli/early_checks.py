"""What can be told before libraries are imported that take seconds: files that are not there, a port that is taken."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.terminal import printable

_EMBEDDED_MODEL = "toybox"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_adapter_is_there(text: str) -> None:
    """Refuse ``FILE[:weight]`` of which no beginning is a file or folder; the rest is checked by whoever opens it.

    Raises:
        UserError: there is no such file.
    """
    beginnings = itertools.accumulate(text.split(":"), "{}:{}".format)  # colons may belong to weights, or to names
    try:
        is_there = any(os.path.exists(os.path.expanduser(beginning)) for beginning in beginnings)
    except ValueError:
        return  # no possible name, as whoever opens it will say
    if not is_there and not re.fullmatch(r"[-+.\d]+", text):  # no weight that lost its file, which is told so
        raise UserError(f"can't read the adapter {printable(text, 200)}: No such file or directory")


def check_base_is_there(name: str) -> None:
    """Refuse a base model that can only be a folder or file, and is not there.

    Raises:
        UserError: there is none, or the folder holds no pipeline.
    """
    if name == _EMBEDDED_MODEL:
        return
    path = Path(os.path.expanduser(name))
    with contextlib.suppress(OSError, ValueError):  # no possible name, as whoever opens it will say
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise UserError(f"{name} holds no model_index.json, so it is no diffusers pipeline folder")
        elif not path.exists() and (not _HUB_NAME.fullmatch(name) or name.startswith(".")):
            raise UserError(f"no such base model folder: {name!r}")


def check_folder_can_be(flag: str, folder: Path) -> None:
    """Refuse a folder that can't be made, or written to.

    Raises:
        UserError: a file is in its place, or the system forbids it.
    """
    existing = next((path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path)), None)
    if existing is None:
        return
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} can't be written to")


def check_port_is_free(address: str, port: int) -> None:
    """Refuse a port on which nothing can listen now.

    Raises:
        UserError: it is taken or forbidden, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            if os.name == "posix":  # on Windows the option would let two programs share a port
                # One that was left a moment ago is free.
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as problem:
        raise UserError(
            f"can't listen on {address}:{port} ({problem.strerror or problem}); choose another --server_port"
        ) from problem
