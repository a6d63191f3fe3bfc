"""Files made to break a reader: flipped bits, cuts, mutants of good adapters, and pickles under an adapter's name.

Files are taken apart and put together here without the product's reader and writer, so that these can't hide each
other's mistakes. Only the digest of an "honest" mutant, which says that its content is what was written, is theirs.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from svft_diffusion.files.container import content_digest, read_container

METADATA = "__metadata__"
OUR_KEY = "svft_diffusion"
DIGEST_KEY = "svft_diffusion.digest"
Place = tuple[str | int, ...]  # in a JSON value: keys and positions in lists, from the top


# JSON that no library writes


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object by its entries, whose names may repeat."""


def json_text(value: Any) -> str:
    """``value`` as compact JSON, with whatever `Raw` and `Pairs` hold in it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{json_text(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return json_text(Pairs(value.items()))
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value)


# A safetensors file in parts


@dataclass
class Parts:
    """A safetensors file taken apart: change a part, and put it together again."""

    table: Pairs  # tensor name -> dtype, shape, data_offsets; and the metadata
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> Parts:
        (length,) = struct.unpack_from("<Q", content)
        return cls(Pairs(json.loads(content[8 : 8 + length]).items()), content[8 + length :])

    def __getitem__(self, name: str) -> Any:
        return dict(self.table)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        names = [key for key, _ in self.table]
        place = names.index(name) if name in names else len(names)
        self.table[place : place + 1] = [(name, value)]

    @property
    def tensors(self) -> list[str]:
        return [name for name, _ in self.table if name != METADATA]

    @property
    def metadata(self) -> dict[str, Any]:
        """The entries beside the tensors; none where they are no object."""
        held = dict(self.table).get(METADATA)
        return held if isinstance(held, dict) else {}

    @property
    def header(self) -> Any:
        """Our header, a copy."""
        return json.loads(self[METADATA][OUR_KEY])

    def set_header(self, header: Any) -> None:
        self[METADATA] = self[METADATA] | {OUR_KEY: Raw(json.dumps(json_text(header)))}

    def bytes_of(self, name: str) -> bytes:
        start, end = self[name]["data_offsets"]
        return self.data[start:end]

    def overwrite(self, name: str, content: bytes, at: int = 0) -> None:
        """Replace some bytes of a tensor's."""
        start = self[name]["data_offsets"][0] + at
        self.data = self.data[:start] + content + self.data[start + len(content) :]

    def replace(self, name: str, content: bytes, shape: Any = None, dtype: Any = None) -> None:
        """Give a tensor other bytes, as many as they may be; what lies behind it moves."""
        start, end = self[name]["data_offsets"]
        shift = len(content) - (end - start)
        self.data = self.data[:start] + content + self.data[end:]
        for other in self.tensors:
            entry = self[other]
            if other != name and entry["data_offsets"][0] >= end:
                self[other] = entry | {"data_offsets": [offset + shift for offset in entry["data_offsets"]]}
        entry = self[name] | {"data_offsets": [start, start + len(content)]}
        self[name] = entry | ({} if shape is None else {"shape": shape}) | ({} if dtype is None else {"dtype": dtype})

    def content(self, *, sealed: bool = True) -> bytes:
        """The file, with the old digest or that of its content."""
        return (self.sealed() if sealed else self)._joined()

    def sealed(self) -> Parts:
        """The same with the digest of this content; as it is where no reader gets as far as the digest."""
        if OUR_KEY not in self.metadata:
            return self
        try:
            container = read_container(self._joined(), "mutant")
            others = {key: text for key, text in container.metadata.items() if key != DIGEST_KEY}
            parts = (
                (name, entry.dtype, entry.shape, container.bytes_of(name))
                for name, entry in sorted(container.entries.items())
            )
            digest = content_digest(parts, others)
        except Exception:  # whatever it is that a reader must bear
            return self
        sealed = Parts(Pairs(self.table), self.data)
        sealed[METADATA] = {**self[METADATA], DIGEST_KEY: digest}
        return sealed

    def _joined(self) -> bytes:
        text = json_text(self.table).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + self.data


# What stands in for a good part

HUGE_NUMBERS = [2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), Raw("9" * 5000), Raw("1e400"), Raw("-1e999"), Raw("NaN")]
WRONG_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 1.5, -0.0, Raw("-0"), Raw("1e0"), Raw("Infinity"), Raw("1E-400"), *HUGE_NUMBERS,
    "", "x", "x" * 10_000, "1", "nan", "../../etc/passwd", "a\nb", "\x1b[2J", "\x00", "\ud800", "\u202e", "\u0435",
    "😀" * 300, [], [[]], [None] * 1000, ["x", "y"], [1, 2], [1.0, 0.0], {}, {"": {}}, {"a": {"b": [1]}}, {"unet": 1},
    Raw('{"a":1,"a":2}'), Raw("[" * 300 + "]" * 300), Raw("{\"a\":" * 5000 + "1" + "}" * 5000),
]  # fmt: skip
NAMES = [
    "", ".", "..", "values", ".values", "unet.values", "unet..values", "unet.a.", "vae.decoder.values", "sketch",
    "sketch ", "SKETCH", "unet.a.sketch", "unet.a.VALUES", "UNET.a.values", "../../etc/passwd.values",
    "/etc/passwd.values", "C:\\a.values", "unet./a.values", "unet.a\x00b.values", "unet.a\n.values",
    "unet.\x1b[2J.values", "unet.\ud800.values", "\ud800.values", "\udfff", "un\u0435t.a.values",
    "unet.\u0430.values", "\u202eunet.a.values", "unet.a.values\n", "unet.a.values\u200b", "😀.a.values",
    "unet.__class__.values", "unet.__dict__.values", "unet.forward.values", "unet.config.values", METADATA, "__proto__",
    f"unet.{'a' * 10_000}.values", f"unet.{'a.' * 5_000}values", "unet.conv_in.values", "unet.conv_in.positions",
    "unet.conv_in.gate", "unet.conv_in.bias", "unet.conv_in.norm", "unet.tokens", "text_encoder.tokens", "unet..tokens",
    "text_encoder_2.tokens", "unet.%s%n.values", "unet.{0}.values", "unet.$(touch x).values", "unet.(a+)+$.values",
]  # fmt: skip
DTYPES: list[Any] = [
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64", "C128", "f32", "F32 ", "float32", "",
    "\ud800", "F" * 10_000, None, 5, True, [], {}, ["F32"],
]  # fmt: skip
SHAPES: list[Any] = [
    [], [0], [1], [-1], [-4], [3.0], [True], [None], ["3"], [[3]], {}, None, "3", 3, [2**31], [2**32], [2**63], [2**64],
    [2**32, 2**32], [2**31, 2**33], [2**62, 4], [0, 2**63], [2**63, 0], [1] * 9, [1] * 10_000, Raw("[1e400]"),
    Raw("[3e0]"), Raw("[-0]"), Raw(f"[{'9' * 5000}]"), Raw("[NaN]"),
]  # fmt: skip
OFFSETS: list[Any] = [
    [], [0], [0, 0], [0, 1], [0, 1, 2], [4, 0], [-4, 0], [-4, 4], [0, 2**31], [0, 2**63], [0, 2**64],
    [2**63, 2**63 + 4], [2**64 - 4, 2**64], [0.0, 4.0], [False, True], ["0", "4"], [None, None], [[0], [4]], {}, None,
    0, Raw("[0,1e400]"), Raw(f"[0,{'9' * 5000}]"),
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, -0.0, 3.4e38, -3.4e38, 1e30, 65504.0, 70000.0]


Change = Callable[["Parts"], None]


class Mutant(NamedTuple):
    """A changed file; ``honest`` where its digest is that of its own content."""

    label: str
    content: bytes
    honest: bool


def mutant_of(good: bytes, change: tuple[str, Change], *, honest: bool) -> Mutant:
    """A good file with one change, under a digest of its own or the old one."""
    parts = Parts.of(good)
    change[1](parts)
    return Mutant(change[0] if honest else f"{change[0]}, old digest", parts.content(sealed=honest), honest)


def random_mutants(good: bytes, count: int, seed: int) -> Iterator[Mutant]:
    """Mutants of two to four changes each."""
    source = random.Random(seed)
    changes = list(single_changes(Parts.of(good)))
    for _ in range(count):
        parts, labels = Parts.of(good), []
        for label, change in source.sample(changes, source.randint(2, 4)):
            before = copy.copy(parts)
            try:
                change(parts)
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                parts = before  # an earlier change took its place away
            else:
                labels.append(label)
        honest = source.random() < 0.7
        yield Mutant(" + ".join(labels), parts.content(sealed=honest), honest)


def single_changes(good: Parts) -> Iterator[tuple[str, Change]]:
    """Every change of one part: of our header, the metadata, the table, or a tensor's bytes."""
    if OUR_KEY in good.metadata:
        yield from _header_changes(good.header)
    yield from _metadata_changes(good)
    for name in good.tensors:
        yield from _entry_changes(good, name)
        yield from _data_changes(good, name)
    yield from _table_changes(good)


def places(value: Any, below: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value."""
    yield below
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*below, key))


def with_value(value: Any, place: Place, new: Any) -> Any:
    """``value`` with something else at a place."""
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = with_value(value[place[0]], place[1:], new)
    return changed


def _without(value: Any, place: Place) -> Any:
    changed = copy.copy(value)
    if len(place) == 1:
        del changed[place[0]]
    else:
        changed[place[0]] = _without(value[place[0]], place[1:])
    return changed


def _value_at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def _header_changes(header: Any) -> Iterator[tuple[str, Change]]:
    def change(label: str, make: Callable[[Any], Any]) -> tuple[str, Change]:
        return f"header {label}", lambda parts: parts.set_header(make(parts.header))

    for place in places(header):
        where = "/".join(map(str, place)) or "itself"
        for index, wrong in enumerate(WRONG_VALUES):
            yield change(f"{where} = {shown(wrong)} #{index}", lambda old, p=place, w=wrong: with_value(old, p, w))
        if place:
            yield change(f"{where} left out", lambda old, p=place: _without(old, p))
        if isinstance(_value_at(header, place), dict):
            yield change(f"{where} with another field", lambda old, p=place: _with_entry(old, p, "another", 1))
            yield change(f"{where} with a field without name", lambda old, p=place: _with_entry(old, p, "", None))
            yield change(f"{where} with every field twice", lambda old, p=place: _doubled(old, p))
            yield change(f"{where} with 10,000 fields", lambda old, p=place: _with_many(old, p))


def _with_entry(header: Any, place: Place, key: str, item: Any) -> Any:
    return with_value(header, place, {**_value_at(header, place), key: item})


def _doubled(header: Any, place: Place) -> Any:
    pairs = list(_value_at(header, place).items())
    return with_value(header, place, Pairs(pairs + pairs))


def _with_many(header: Any, place: Place) -> Any:
    return with_value(header, place, {**_value_at(header, place), **{f"k{index}": index for index in range(10_000)}})


def _metadata_changes(good: Parts) -> Iterator[tuple[str, Change]]:
    def put(value: Any) -> Change:
        return lambda parts: parts.__setitem__(METADATA, value)

    metadata = good.metadata
    for index, wrong in enumerate(WRONG_VALUES):
        yield f"metadata = {shown(wrong)} #{index}", put(wrong)
        yield f"metadata + {shown(wrong)} #{index}", put({**metadata, "another": wrong})
        for key in metadata:
            yield f"metadata {key} = {shown(wrong)} #{index}", put({**metadata, key: wrong})
    for key in metadata:
        yield f"metadata without {key}", put({other: text for other, text in metadata.items() if other != key})
        yield f"metadata {key} twice", put(Pairs([*metadata.items(), (key, metadata[key])]))
        yield f"metadata {key} in quotes", put({**metadata, key: json.dumps(metadata[key])})
        yield f"metadata {key} cut", put({**metadata, key: metadata[key][:-1]})
        yield f"metadata {key} with a byte order mark", put({**metadata, key: "\ufeff" + metadata[key]})


def _entry_changes(good: Parts, name: str) -> Iterator[tuple[str, Change]]:
    entry = good[name]
    (count, *_), (start, end) = entry["shape"] or [1], entry["data_offsets"]
    close_shapes = [[1, count], [count, 1], [count, 0], [count + 1], [count - 1], [float(count)], [-count, -1]]
    for key, values in (
        ("dtype", DTYPES),
        ("shape", [*SHAPES, *close_shapes]),
        (
            "data_offsets",
            [*OFFSETS, [start, end + 1], [start + 1, end], [start + 8, end + 8], [start, 2 * end], [end, start]],
        ),
    ):
        for index, value in enumerate(values):
            yield (
                f"{name}: {key} = {shown(value)} #{index}",
                lambda parts, key=key, value=value: parts.__setitem__(name, parts[name] | {key: value}),
            )
        yield (
            f"{name}: no {key}",
            lambda parts, key=key: parts.__setitem__(name, {k: v for k, v in parts[name].items() if k != key}),
        )
        yield (
            f"{name}: {key} twice",
            lambda parts, key=key: parts.__setitem__(name, Pairs([*parts[name].items(), (key, parts[name][key])])),
        )
    yield f"{name}: another key", lambda parts: parts.__setitem__(name, parts[name] | {"extra": 1})
    for index, wrong in enumerate(WRONG_VALUES):
        yield f"{name}: entry = {shown(wrong)} #{index}", lambda parts, wrong=wrong: parts.__setitem__(name, wrong)
    # A dtype together with a shape that goes with it: the same bytes read as another type.
    for dtype, size in {"F16": 2, "BF16": 2, "F64": 8, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}.items():
        fitting = {"dtype": dtype, "shape": [(end - start) // size]}
        yield f"{name}: read as {dtype}", lambda parts, new=fitting: parts.__setitem__(name, parts[name] | new)
    for index, new in enumerate(NAMES):
        yield f"{name}: called {new[:40]!a} #{index}", lambda parts, new=new: _rename(parts, name, new)
        yield (
            f"{name}: the rest called so, {new[:40]!a} #{index}",
            lambda parts, new=new: _rename_layer(parts, name, new),
        )


def _rename(parts: Parts, name: str, new: str) -> None:
    parts.table[:] = [(new if key == name else key, value) for key, value in parts.table]


def _rename_layer(parts: Parts, name: str, new: str) -> None:
    """All tensors of one layer, which then is another layer."""
    layer, other = name.rpartition(".")[0], new.rpartition(".")[0]
    parts.table[:] = [
        (f"{other}{key.removeprefix(layer)}" if layer and key.startswith(f"{layer}.") else key, value)
        for key, value in parts.table
    ]


def _table_changes(good: Parts) -> Iterator[tuple[str, Change]]:
    def table(make: Callable[[Pairs], Any]) -> Change:
        return lambda parts: parts.table.__setitem__(slice(None), make(Pairs(parts.table)))

    for name in good.tensors:
        yield f"without {name}", table(lambda old, name=name: [pair for pair in old if pair[0] != name])
        yield f"{name} twice", table(lambda old, name=name: [*old, (name, dict(old)[name])])
        yield (
            f"{name} twice, once empty",
            table(lambda old, name=name: [(name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), *old]),
        )
        yield (
            f"{name} a second time under another name",
            table(lambda old, name=name: [*old, ("unet.other.values", dict(old)[name])]),
        )
        yield f"{name} cut off with its bytes", lambda parts, name=name: _cut_tensor(parts, name)
        yield f"{name} emptied", lambda parts, name=name: parts.replace(name, b"", [0])
        yield f"{name} longer", lambda parts, name=name: _longer(parts, name)
    yield "table reversed", table(lambda old: old[::-1])
    yield "no tensors", lambda parts: _no_tensors(parts)
    yield (
        "an empty tensor more",
        table(lambda old: [*old, ("unet.other.values", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})]),
    )
    yield "bytes behind the last tensor", lambda parts: setattr(parts, "data", parts.data + bytes(8))
    yield "the last bytes missing", lambda parts: setattr(parts, "data", parts.data[:-4])
    yield "no data", lambda parts: setattr(parts, "data", b"")


def _cut_tensor(parts: Parts, name: str) -> None:
    parts.replace(name, b"", [0])
    parts.table[:] = [pair for pair in parts.table if pair[0] != name]


def _no_tensors(parts: Parts) -> None:
    for name in parts.tensors:
        _cut_tensor(parts, name)


def _longer(parts: Parts, name: str) -> None:
    content, shape = parts.bytes_of(name), parts[name]["shape"]
    parts.replace(name, content * 2, [shape[0] * 2] if len(shape) == 1 else shape)


def _data_changes(good: Parts, name: str) -> Iterator[tuple[str, Change]]:
    dtype, content = good[name]["dtype"], good.bytes_of(name)
    if dtype in ("F32", "F16"):
        kind = np.dtype("<f4" if dtype == "F32" else "<f2")
        with np.errstate(all="ignore"):
            for number in NUMBERS:
                one = np.array(number).astype(kind).tobytes()
                for at in sorted({0, len(content) - len(one)}):
                    yield f"{name}[{at}] = {number}", lambda parts, b=one, at=at: parts.overwrite(name, b, at)
                yield f"{name} all {number}", lambda parts, b=one: parts.overwrite(name, b * (len(content) // len(b)))
        return
    if dtype == "I32":
        count = len(content) // 4
        old = np.frombuffer(content, "<i4")
        lists = [
            -old, old[::-1], np.zeros(count), np.full(count, -1), np.full(count, 2**31 - 1), old - old[0] - 1,
            old + 2**20, np.arange(count) - 2**31, np.r_[old[:-1], old[-2:-1]], np.r_[old[:-1], 2**31 - 1],
            np.arange(count), np.arange(count) + 1,
        ]  # fmt: skip
        for index, new in enumerate(lists):
            yield (
                f"{name} = list {index}",
                lambda parts, new=new: parts.overwrite(name, np.asarray(new).astype("<i8").astype("<i4").tobytes()),
            )
        return
    # Records of lengths and bytes: lies about the lengths, and about everything else.
    for at, four in itertools.product(
        sorted({*range(0, min(len(content) - 4, 24)), len(content) // 2}),
        (
            bytes(4),
            b"\xff" * 4,
            b"\xff\xff\xff\x7f",
            struct.pack("<I", len(content)),
            struct.pack("<I", len(content) - 20),
        ),
    ):
        yield f"{name} bytes {at} = {four.hex()}", lambda parts, b=four, at=at: parts.overwrite(name, b, at)
    for label, new in {
        "zeros": bytes(len(content)),
        "ones": b"\xff" * len(content),
        "half": content[: len(content) // 2],
        "one byte": content[:1],
        "less one": content[:-1],
        "and one": content + b"\0",
        "twice": content * 2,
        "a megabyte": content + bytes(2**20),
        "NaN": struct.pack("<f", math.nan) * (len(content) // 4) + content[len(content) // 4 * 4 :],
    }.items():
        yield f"{name} = {label}", lambda parts, new=new: parts.replace(name, new, [len(new)])


def flipped(good: bytes, bit: int) -> bytes:
    """``good`` with one bit turned."""
    content = bytearray(good)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def shown(value: Any) -> str:
    return ascii(value)[:30]


def sampled(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Some of ``items``, the same for one seed."""
    return random.Random(seed).sample(list(items), min(count, len(items)))
