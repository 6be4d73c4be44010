"""Damaged and hostile files: for a good file, what may have become of it."""

import json
import os
import random
import struct

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _flips(content, dice, times):
    for _ in range(times):
        place, change = dice.randrange(len(content)), dice.randrange(1, 256)
        flipped = bytearray(content)
        flipped[place] ^= change
        yield f"byte {place} xor {change}", bytes(flipped)


def _truncations(content, dice, times):
    places = {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1}
    places |= {dice.randrange(len(content)) for _ in range(times)}
    for place in sorted(places):
        yield f"cut off at {place}", content[:place]


def _replacements(content):
    yield "random bytes", random.Random(1).randbytes(len(content))
    yield "zeros", bytes(len(content))
    yield "a pickle", b"\x80\x02cos\nsystem\n(S'exit 1'\ntR."
    yield "a zip", b"PK\x03\x04" + content
    yield "another format", b"GGUF" + content
    yield "more behind it", content + b"more"


def _headers(content):
    """Safetensors whose headers lie."""

    def file(header, data=b"\0" * 8, length=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    first = next(key for key in header if key != "__metadata__")

    def changed(**facts):
        return file({**header, first: {**header[first], **facts}}, data)

    yield "a header of 2**64 - 1 bytes", file(header, data, 2**64 - 1)
    yield "a header of 2**40 bytes", file(header, data, 2**40)
    yield "a header that is cut off", file(header, data, length // 2)
    yield "no tensors", file({}, b"")
    yield "a header that is a list", file([1, 2])
    yield "deep nesting", file(b"[" * 100_000)
    yield "not UTF-8", file(b"\xff\xfe{}")
    yield "overlapping tensors", file({"a": TENSOR, "b": TENSOR})
    yield "holes", file({"a": TENSOR, "b": {**TENSOR, "data_offsets": [16, 24]}}, b"\0" * 24)
    yield "a negative offset", file({"a": {**TENSOR, "data_offsets": [-8, 0]}})
    yield "offsets behind the end", changed(data_offsets=[0, 2**40])
    yield "an unknown dtype", changed(dtype="Q3")
    yield "an integer dtype", changed(dtype="I32")
    yield "a huge shape", changed(shape=[2**62, 2**62])
    yield "a shape of strings", changed(shape=["64"])
    yield "a negative shape", changed(shape=[-64])
    yield "another name", file({(key + "x" if key == first else key): value for key, value in header.items()}, data)
    yield "no name", file({("" if key == first else key): value for key, value in header.items()}, data)


def _jsons(content):
    values = json.loads(content)
    yield from (
        (text, text.encode())
        for text in ("", " ", "null", "true", "1", "1e999", '"text"', "[]", "{}", "[{}]", "{", "NaN", "-Infinity")
    )
    yield "deep lists", b"[" * 100_000 + b"]" * 100_000
    yield "deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "UTF-16", content.decode().encode("utf-16")
    yield "a lone surrogate", b'{"\xed\xa0\x80": 1}'
    yield "not UTF-8", content.replace(b'"', b'"\xff', 1)
    yield "a number of 10 000 digits", b'{"format": ' + b"1" * 10_000 + b"}"
    for key in values:
        for value in (None, True, -1, 1e308, "text", [], {}, [[1]], {"a": {"b": 1}}, "../../../etc/passwd"):
            if values[key] != value or type(values[key]) is not type(value):
                yield f"{key} = {value!r}", json.dumps({**values, key: value}).encode()
        yield f"{key} = NaN", json.dumps({**values, key: float("nan")}).encode()
        yield f"without {key}", json.dumps({other: values[other] for other in values if other != key}).encode()


def damaged(file, seed=0, times=4):
    """Name and content of each damage to a file; content `None` stands for a change of the file's kind."""
    content, dice = file.read_bytes(), random.Random(seed)
    yield from _truncations(content, dice, times)
    yield from _flips(content, dice, times)
    yield from _replacements(content)
    if file.suffix == ".safetensors":
        yield from _headers(content)
    else:
        changes = list(_jsons(content))
        yield from dice.sample(changes, min(len(changes), 60 * times))


def other_kinds(file):
    """Puts something that is no regular file, or nothing, in the file's place; yields its name each time."""
    content = file.read_bytes()
    file.unlink()
    yield "missing"
    file.mkdir()
    yield "a directory"
    file.rmdir()
    os.mkfifo(file)
    yield "a FIFO"
    file.unlink()
    for target in ("/dev/zero", "/dev/tty", "nowhere", file.name):
        file.symlink_to(target)
        yield f"a link to {target}"
        file.unlink()
    file.write_bytes(content)
