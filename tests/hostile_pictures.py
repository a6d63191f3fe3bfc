"""PNG pictures that carry an adapter, taken apart and put together wrongly."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator

from hostile_files import WRONG_VALUES, json_text, places, shown, with_value

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OUR_CHUNK = b"svFt"


def chunk(kind: bytes, body: bytes, *, length: int | None = None) -> bytes:
    """A chunk of a PNG file with its checksum; ``length`` lies about its size."""
    size = struct.pack(">I", len(body) if length is None else length)
    return size + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(picture: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG file with one more chunk, behind the first one."""
    return picture[:33] + chunk(kind, body) + picture[33:]


def chunks_of(picture: bytes) -> list[tuple[bytes, bytes]]:
    """Type and data of each chunk of a good PNG file."""
    found, position = [], len(_SIGNATURE)
    while position < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, position)
        found.append((kind, picture[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def picture_without_adapter(picture: bytes) -> bytes:
    """The same picture, carrying nothing."""
    return _SIGNATURE + b"".join(chunk(*pair) for pair in chunks_of(picture) if pair[0] != _OUR_CHUNK)


def picture_changes(picture: bytes, adapter: bytes) -> Iterator[tuple[str, bytes]]:
    """Changes of a picture that carries an adapter, with all checksums right."""
    plain = [pair for pair in chunks_of(picture) if pair[0] != _OUR_CHUNK]
    head, body, end = chunk(*plain[0]), b"".join(chunk(*pair) for pair in plain[1:-1]), chunk(*plain[-1])
    ours = chunk(_OUR_CHUNK, adapter)

    def file(*parts: bytes) -> bytes:
        return _SIGNATURE + b"".join(parts)

    for label, content in {
        "the same adapter twice": file(head, ours, ours, body, end),
        "an adapter and a damaged one": file(head, ours, chunk(_OUR_CHUNK, adapter[:-1]), body, end),
        "adapter in front of the header": file(ours, head, body, end),
        "adapter behind the end": file(head, body, end, ours),
        "adapter behind the pixels": file(head, body, ours, end),
        "adapter in two chunks": file(head, *(chunk(_OUR_CHUNK, half) for half in (adapter[:500], adapter[500:])), end),
        "empty adapter": file(head, chunk(_OUR_CHUNK, b""), body, end),
        "adapter alone": file(ours),
        "signature alone": file(),
        "a picture as the adapter": file(head, chunk(_OUR_CHUNK, picture), body, end),
        "no pixels": file(head, ours, end),
        "no end": file(head, ours, body),
        "two ends": file(head, ours, body, end, end),
        "two headers": file(head, head, ours, body, end),
        "an end with contents": file(head, ours, body, chunk(b"IEND", b"x")),
        "a type that is no text": file(head, ours, chunk(b"\xff\x00\n\x1b", b""), body, end),
        "90,000 chunks": file(head, ours, chunk(b"teSt", b"") * 90_000, body, end),
        "200,000 chunks": file(head, ours, chunk(b"teSt", b"") * 200_000, body, end),
        "a bomb of zeros": file(head, ours, chunk(b"zTXt", b"svft_diffusion\0\0" + _bomb()), body, end),
        "a bomb as international text": file(head, ours, chunk(b"iTXt", b"svft_diffusion\0\1\0\0\0" + _bomb()), end),
        "a bomb as colours": file(head, ours, chunk(b"iCCP", b"x\0\0" + _bomb()), body, end),
    }.items():
        yield label, content
    for kind in (b"SVFT", b"svft", b"svFT", b"SvFt", b"tEXt", b"IDAT"):
        yield f"adapter in {kind.decode()}", file(head, chunk(kind, adapter), body, end)
    for length in (
        0,
        1,
        len(adapter) - 1,
        len(adapter) + 1,
        len(adapter) + 12,
        2**31 - 1,
        2**31,
        2**32 - 12,
        2**32 - 1,
    ):
        yield f"adapter of {length} bytes", file(head, chunk(_OUR_CHUNK, adapter, length=length), body, end)
    digest = hashlib.sha256(adapter).hexdigest()
    good = {"adapters": [{"sha256": digest, "name": "dog", "weight": 1.0}], "seed": 3}
    for place in places(good):
        for index, wrong in enumerate(WRONG_VALUES):
            text = json_text(with_value(good, place, wrong)).encode("latin-1", "replace")
            settings = chunk(b"tEXt", b"svft_diffusion\0" + text)
            label = f"settings {'/'.join(map(str, place))} = {shown(wrong)} #{index}"
            yield label, file(head, settings, ours, body, end)
            if place[-1:] == ("name",):
                yield f"{label}, two adapters", file(head, settings, ours, ours, body, end)
    for label, text in {
        "without keyword": b"",
        "keyword alone": b"svft_diffusion",
        "no JSON": b"svft_diffusion\0{",
        "of lists": b'svft_diffusion\0{"adapters":[' + b"[]," * 300_000 + b"[]]}",
        "of names": b'svft_diffusion\0{"adapters":{'
        + b",".join(b'"%06d":0' % index for index in range(90_000))
        + b"}}",
        "of depth": b'svft_diffusion\0{"adapters":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "large": b"svft_diffusion\0" + b" " * 2**22,
        "with a name of a million letters": b'svft_diffusion\0{"adapters":[{"sha256":"%s","name":"%s","weight":1}]}'
        % (digest.encode(), b"x" * 1_000_000),
    }.items():
        yield f"settings {label}", file(head, chunk(b"tEXt", text), ours, body, end)
        yield f"settings {label}, two adapters", file(head, chunk(b"tEXt", text), ours, ours, body, end)


def _bomb() -> bytes:
    return zlib.compress(bytes(2**26), 9)
