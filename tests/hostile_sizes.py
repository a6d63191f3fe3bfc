"""Adapter files damaged below the level of JSON; and small ones that make a careless reader slow or large."""

from __future__ import annotations

import copy
import itertools
import json
import struct
from collections.abc import Iterator

from hostile_files import METADATA, OUR_KEY, Parts, Raw, json_text

_LIMIT = 2 * 2**20  # of a header, in bytes


def heavy_files(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Files whose header or contents make a careless reader slow, or take many times their size in memory."""
    parts = Parts.of(good)
    metadata = json_text({METADATA: parts[METADATA]})[1:-1]
    rest = metadata + "".join(f",{json.dumps(name)}:{json_text(parts[name])}" for name in parts.tensors)

    def in_table(value: str) -> bytes:
        text = f'{{"x":{value},{rest}}}'.encode()
        return struct.pack("<Q", len(text)) + text + parts.data

    def in_header(value: str) -> bytes:
        changed = copy.deepcopy(parts)
        fields = json_text({**changed.header, "training": Raw(value)})
        changed[METADATA] = changed[METADATA] | {OUR_KEY: fields}
        return changed.content()

    def filled(item: str, first: str = "[", last: str = "]", size: int = _LIMIT - 30_000) -> str:
        return first + ",".join([item] * (size // (len(item) + 1))) + last

    def numbered(form: str, size: int = _LIMIT - 30_000) -> str:
        count = size // (len(form % 0) + 1)
        return "{" + ",".join(form % index for index in range(count)) + "}"

    for small in (150_000, 390_000, _LIMIT - 30_000):
        for place, put in (("table", in_table), ("our header", in_header)):
            size = small if place == "table" else small * 3 // 4  # quotes and braces may need escapes
            for item in ("[]", "{}", "[[]]", '""', "0", "1.5", '{"a":0}', "null", '"é"', '"😀"'):
                yield f"{size} bytes of {item} in the {place}", put(filled(item, size=size))
            yield f"{size} bytes of names in the {place}", put(numbered('"%06d":0', size=size))
            yield f"{size} bytes of objects in the {place}", put(numbered('"%06d":{}', size=size))
            last_twice = numbered('"%06d":0', size=size)[:-1] + ',"z":0,"z":0}'
            yield f"{size} bytes of names, the last one twice, in the {place}", put(last_twice)
            yield f"{size} bytes of one name in the {place}", put(filled('"a":0', "{", "}", size=size))
    for depth in (500, 900, 5_000, 100_000):
        for place, put in (("table", in_table), ("our header", in_header)):
            yield f"{depth} lists deep in the {place}", put("[" * depth + "]" * depth)
            yield f"{depth} open lists in the {place}", put("[" * depth)
            yield f"{depth} objects deep in the {place}", put('{"":' * depth + "0" + "}" * depth)
            yield f"{depth} mixed deep in the {place}", put('[{"a":' * depth + "0" + "}]" * depth)
    for place, put in (("table", in_table), ("our header", in_header)):
        yield f"an integer of 4,000 digits in the {place}", put("9" * 4000)
        yield f"an integer of a million digits in the {place}", put("9" * 1_000_000)
        yield f"a fraction of a million digits in the {place}", put("0." + "3" * 1_000_000)
        yield f"an exponent of a million digits in the {place}", put("1e" + "9" * 1_000_000)
        yield f"text of a million letters in the {place}", put('"' + "x" * 1_000_000 + '"')
        yield f"text of escapes in the {place}", put('"' + "\\u0041" * 150_000 + '"')
        yield f"text that ends in wide letters in the {place}", put('"' + "x" * 1_000_000 + '😀"')
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for count in (1_000, 15_000, 30_000, 100_000):
        many = ",".join(f'"unet.a{index}.values":{empty}' for index in range(count))
        text = f"{{{rest},{many}}}".encode()
        yield f"{count} empty tensors", struct.pack("<Q", len(text)) + text + parts.data
    yield from _many_layers(parts)
    for claimed in (2**21, 2**24, 2**31, 2**40, 2**63):
        yield f"a header of {claimed} bytes that is not there", struct.pack("<Q", claimed) + good[8:]


def _many_layers(parts: Parts) -> Iterator[tuple[str, bytes]]:
    """Files of good layers, as many as fit, made from one of a single layer without positions."""
    for count, nested in ((2_000, True), (5_000, False), (9_990, False), (19_990, False)):
        changed = copy.deepcopy(parts)
        names = [f"unet.{'a.' * (index % 50 if nested else 1)}{index:05d}.values" for index in range(count)]
        sketch = parts.bytes_of("sketch") * count
        changed.data = sketch + bytes(4 * count)
        header = changed.header | {"components": {"unet": count}}
        digests = {kind: text * count for kind, text in header["base"]["digests"].items()}
        changed.table[:] = [(METADATA, parts[METADATA])]
        changed.set_header(header | {"base": header["base"] | {"digests": digests}})
        changed.table += [("sketch", {"dtype": "U8", "shape": [len(sketch)], "data_offsets": [0, len(sketch)]})]
        changed.table += [
            (name, {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]})
            for start, name in zip(itertools.count(len(sketch), 4), names, strict=False)
        ]
        yield f"{count} layers{' of long names' if nested else ''}", changed.content()


def byte_changes(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Changes below the level of JSON: the length in front, the encoding, what surrounds the file."""
    (length,) = struct.unpack_from("<Q", good)
    text, data = good[8 : 8 + length], good[8 + length :]

    def file(text: bytes, claimed: int | None = None, data: bytes = data) -> bytes:
        return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data

    lies = [0, 1, 2, 7, 8, length - 8, length - 1, length + 1, length + 8, len(good) - 8, len(good) - 7, len(good)]
    for lie in [*lies, 2**20, 2**21 + 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]:
        yield f"header of {lie} bytes", file(text, lie)
    yield "byte order mark", file(b"\xef\xbb\xbf" + text)
    yield "UTF-16", file(text.decode().encode("utf-16"))
    yield "UTF-16 without mark", file(text.decode().encode("utf-16-le"))
    yield "UTF-32", file(text.decode().encode("utf-32"))
    for at in (1, 2, length // 2, length - 2):
        for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x00", b"\x80"):
            yield f"{bad.hex()} at {at}", file(text[:at] + bad + text[at:])
    yield "spaces in front", file(b"  " + text)
    yield "spaces behind", file(text + b" " * 64)
    yield "a million spaces", file(text + b" " * 1_000_000)
    yield "newlines behind", file(text + b"\n" * 8)
    yield "zeros behind the header", file(text + b"\0" * 8)
    yield "two objects", file(text.rstrip() + text)
    yield "a comma more", file(text.rstrip()[:-1] + b",}")
    yield "a list around it", file(b"[" + text.rstrip() + b"]")
    yield "an object around it", file(b'{"a":' + text.rstrip() + b"}")
    yield "a comment", file(b"{/* */" + text[1:])
    for count in (1, 4, 8, 4096):
        yield f"{count} bytes behind", good + bytes(count)
        yield f"{count} bytes in front", bytes(count) + good
    yield "the file twice", good + good
    yield "line ends of Windows", good.replace(b"\n", b"\r\n")
    yield "text mode", good.decode("utf-8", "replace").encode()
    yield "empty", b""
    yield "only the length", good[:8]
    yield "only the header", good[: 8 + length]
    yield "only zeros", bytes(len(good))
    yield "only ones", b"\xff" * len(good)
