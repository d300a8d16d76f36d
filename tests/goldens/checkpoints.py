"""Real TensorFlow checkpoints, committed without their bulk.

A checkpoint is two files. `.index` is a sorted table: for each tensor its name, type, shape, place in the other file and
CRC. `.data-00000-of-00001` is the tensors' bytes, 140 MB and more. The scripts that run the authors' code fill the
variables by the recipe (recipe.py), let that code write the checkpoint, and `keep` the `.index` as it was written, beside
the few tensors that no recipe draws (step counters, the object graph) and the SHA-256 of the data. `redraw` makes the data
file again, byte for byte: the result is the checkpoint that the authors' code wrote, and nothing of it is our making.

The reader of `.index` files here is not the library's on purpose: it makes what the library's is tested with.

Python 3.7 and numpy 1.18 are enough, because the authors' first code needs those.
"""
import hashlib
import json
import os
import shutil
import struct

import numpy as np

if __package__:
    from . import recipe
else:                                                              # beside the scripts that write checkpoints
    import recipe

FOLDER = os.path.dirname(os.path.abspath(__file__))
TYPES = {1: "float32", 2: "float64", 3: "int32", 7: "string", 9: "int64"}      # TensorFlow's DataType


def _varint(buffer, at):
    value = shift = 0
    while True:
        byte = buffer[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _block(table, at, size):
    """(key, value) pairs of one block of a LevelDB table; a key shares a prefix with the key before it."""
    block = table[at:at + size]
    assert table[at + size] == 0, "a compressed block"
    end, at, key = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0], 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at:at + fresh]
        yield key, block[at + fresh:at + fresh + length]
        at += fresh + length


def _fields(message):
    """{field number: value} of a protocol buffer message without repeated fields, but for the list under `dims`."""
    at, out = 0, {}
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            item, at = _varint(message, at)
        elif tag & 7 == 2:
            length, at = _varint(message, at)
            item, at = message[at:at + length], at + length
        else:
            item, at = struct.unpack("<I", message[at:at + 4])[0], at + 4
        out.setdefault(tag >> 3, []).append(item)
    return out


def tensors(index):
    """{name: (type, shape, offset, size)} of an `.index` file, in the order of the data."""
    with open(index, "rb") as f:
        table = f.read()
    at = len(table) - 48                                           # the footer: two handles, padding, a magic number
    for _ in range(2):
        _, at = _varint(table, at)
    start, at = _varint(table, at)
    size, _ = _varint(table, at)
    found = {}
    for _, handle in _block(table, start, size):
        start, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        for key, message in _block(table, start, size):
            if key:                                                # the empty key is the header
                fields = _fields(message)
                dims = [_fields(d).get(1, [0])[0] for d in _fields(fields.get(2, [b""])[0]).get(2, [])]
                found[key.decode()] = TYPES[fields[1][0]], dims, fields.get(4, [0])[0], fields.get(5, [0])[0]
    return dict(sorted(found.items(), key=lambda item: item[1][2]))


def digest(path):
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as f:
        for piece in iter(lambda: f.read(1 << 22), b""):
            total.update(piece)
    return total.hexdigest()


def keep(name, prefix, source, seed, params, drawn):
    """Commit the checkpoint at `prefix` as `name`: `drawn` says which entry of `params` each of its tensors holds."""
    table, data, raw, zeros = tensors(prefix + ".index"), prefix + ".data-00000-of-00001", {}, []
    with open(data, "rb") as f:
        for key, (_, _, offset, size) in table.items():
            f.seek(offset)
            if key not in drawn:
                content = f.read(size)
                if size > 256 and not any(content):                # the velocity of an optimizer before its first step
                    zeros.append(key)
                else:
                    raw[key] = np.frombuffer(content, np.uint8)
    spec = dict(source=source, seed=seed, params=params, drawn=drawn, zeros=zeros, raw=list(raw), size=os.path.getsize(data),
                sha256=digest(data))
    shutil.copy(prefix + ".index", os.path.join(FOLDER, name + ".index"))
    recipe.save(os.path.join(FOLDER, name + ".npz"), spec, {f"raw{i}": x for i, x in enumerate(raw.values())})


def load_spec(name):
    """What is known of the committed checkpoint `name`: source, seed, params, drawn, zeros, raw, size, sha256."""
    return recipe.load_spec(os.path.join(FOLDER, name + ".npz"))


def redraw(name, folder, check=True):
    """The checkpoint `name` as its writer left it, in `folder`: its prefix. Tensors of zeros are holes in the file."""
    spec, arrays = load_spec(name), recipe.load_arrays(os.path.join(FOLDER, name + ".npz"))
    prefix, entries = os.path.join(str(folder), name), {e["name"]: e for e in spec["params"]}
    shutil.copy(os.path.join(FOLDER, name + ".index"), prefix + ".index")
    with open(prefix + ".data-00000-of-00001", "wb") as f:
        f.truncate(spec["size"])
        for key, (kind, shape, offset, size) in tensors(prefix + ".index").items():
            f.seek(offset)
            if key in spec["drawn"]:
                value = recipe.value(entries[spec["drawn"][key]], spec["seed"])
                assert kind == "float32" and list(value.shape) == shape and value.nbytes == size, key
                f.write(value.tobytes())
            elif key in spec["raw"]:
                f.write(arrays[f"raw{spec['raw'].index(key)}"].tobytes())
    if check:
        assert digest(prefix + ".data-00000-of-00001") == spec["sha256"], name + " is not as it was written"
    return prefix


if __name__ == "__main__":
    for name in sorted(f[:-6] for f in os.listdir(FOLDER) if f.endswith(".index")):
        print(name, json.dumps({k: len(v) if isinstance(v, (list, dict)) else v for k, v in load_spec(name).items()}))
