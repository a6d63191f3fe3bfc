"""Names and passwords of visitors: a file of salted hashes, and a limit on attempts.

A line of the file is ``NAME:scrypt:SALT:KEY``, the last two in hexadecimal.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
from starlette.exceptions import HTTPException

from svft_diffusion.app.serving.security import caller_address
from svft_diffusion.errors import UserError

MOST_ATTEMPTS = 5  # that fail, of one address and for one name
SECONDS = 60.0  # within this time
SHORTEST_PASSWORD = 8
_LONGEST_PASSWORD = 1024

# As OWASP recommends: 32 MiB and about 0.2 s for each attempt.
_COST = {"n": 2**15, "r": 8, "p": 3, "maxmem": 64 * 2**20, "dklen": 32}
_NAME = re.compile(r"[^\s:](?:[^:\x00-\x1f]{0,62}[^\s:])?")
_LINE = re.compile(r"(?P<name>[^:]+):scrypt:(?P<salt>[0-9a-f]{32}):(?P<key>[0-9a-f]{64})")


@dataclass(frozen=True)
class StoredPassword:
    """What is kept of a password."""

    salt: bytes
    key: bytes

    @classmethod
    def of(cls, password: str) -> StoredPassword:
        """With a new salt."""
        salt = secrets.token_bytes(16)
        return cls(salt, _key(password, salt))

    def belongs_to(self, password: str) -> bool:
        """Compared in a time that tells nothing."""
        return hmac.compare_digest(_key(password, self.salt), self.key)


def _key(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, **_COST)


def read_logins(file: Path) -> dict[str, StoredPassword]:
    """The logins of a file, by name; empty lines and those that begin with # don't count.

    Raises:
        UserError: it can't be read, or a line is none of `add_login`.
    """
    logins = _logins_in(file)
    if not logins:
        raise UserError(f"there is no login in {file}; make one with --add_login NAME --auth_file {file}")
    return logins


def _logins_in(file: Path) -> dict[str, StoredPassword]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # an editor may have begun it with a mark
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"can't read the logins in {file}: {getattr(problem, 'strerror', None) or problem}") from None
    logins = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or not _NAME.fullmatch(match["name"]):
            raise UserError(f"line {number} of {file} is no login; make one with --add_login NAME --auth_file {file}")
        if match["name"] in logins:
            raise UserError(f"line {number} of {file} is a second login of {match['name']}; remove one of the two")
        logins[match["name"]] = StoredPassword(bytes.fromhex(match["salt"]), bytes.fromhex(match["key"]))
    return logins


def add_login(file: Path, name: str, password: str) -> None:
    """Write a login at the end of ``file``, which only its owner can read if it is new.

    Raises:
        UserError: a name or password that can't be used, a name that is there already, or an unwritable file.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"a name has 1 to 64 characters, no colon, and no space around it; got {name!r}")
    if not SHORTEST_PASSWORD <= len(password) <= _LONGEST_PASSWORD:
        raise UserError(f"a password has {SHORTEST_PASSWORD} to {_LONGEST_PASSWORD} characters, got {len(password)}")
    if file.exists() and name in _logins_in(file):
        raise UserError(f"{name} is in {file} already; remove that line to give another password")
    stored = StoredPassword.of(password)
    line = f"{name}:scrypt:{stored.salt.hex()}:{stored.key.hex()}\n"
    try:
        if file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n"):
            line = f"\n{line}"  # an editor may have left the last line open
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as out:
            out.write(line)
    except OSError as problem:
        raise UserError(f"can't write the login to {file}: {problem.strerror or problem}") from problem


class Attempts:
    """Counts failed attempts by a key, such as an address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def begin(self, *keys: str) -> float | None:
        """Count an attempt for each of ``keys``, or for none if one of them has had its share; then the seconds to
        wait."""
        now = self._clock()
        with self._lock:
            for key, times in list(self._times.items()):
                self._times[key] = [then for then in times if now - then < SECONDS]
                if not self._times[key]:
                    del self._times[key]
            waits = [
                SECONDS - (now - times[0]) for key in keys if len(times := self._times.get(key, [])) >= MOST_ATTEMPTS
            ]
            if waits:
                return max(waits)
            for key in keys:
                self._times[key].append(now)
        return None

    def succeeded(self, *keys: str) -> None:
        """Take the latest attempt of ``keys`` back: it was none to guess."""
        with self._lock:
            for key in keys:
                if self._times[key]:
                    self._times[key].pop()


class Login:
    """Answers whether a name and a password let a visitor in."""

    def __init__(self, logins: Mapping[str, StoredPassword], attempts: Attempts | None = None) -> None:
        self._logins = dict(logins)
        self._attempts = Attempts() if attempts is None else attempts
        # An unknown name takes as long as a known one.
        self._nobody = StoredPassword.of(secrets.token_hex())

    async def check(self, name: str, password: str) -> bool:
        """Whether they belong together.

        Raises:
            HTTPException: 429, after too many attempts.
        """
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        keys = (f"address {caller_address.get()}", f"name {digest}")
        wait = self._attempts.begin(*keys)
        if wait is not None:
            raise HTTPException(
                429, "Too many wrong passwords. Wait a minute, then try again.", {"Retry-After": str(int(wait) + 1)}
            )
        stored = self._logins.get(name, self._nobody)
        belongs = await anyio.to_thread.run_sync(stored.belongs_to, password[: _LONGEST_PASSWORD + 1])
        if belongs:
            self._attempts.succeeded(*keys)
        return belongs
