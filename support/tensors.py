"""Named tensors in a file: the safetensors format, read and written; pytorch_model.bin, read.

A safetensors file is eight bytes (the length of the header, little-endian), the header (json: a name ->
{"dtype", "shape", "data_offsets": [begin, end]}) and the numbers, one tensor behind the other. Such a file
may come from a stranger, so nothing in it is believed: the header is no longer than the file and 100 MB,
every shape fits its offsets, and all offsets together fill the file without a hole and without an overlap. So
no more memory is asked for than the file has bytes (of a .bin twice as many), and what is wrong is one line.
"""
import json
import math
import os

import torch

from support.files import read_torch, write_whole
from support.log import UserError, visible

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER = 100_000_000  # bytes of a header at most, the limit of the format
DIMENSIONS = 8  # of a tensor at most


class Broken(Exception):
    """What is wrong with a file, for the one line that names it."""


def read_tensors(path):
    """{name: tensor} of a file on the CPU, by its ending .safetensors or .bin. UserError's one line for a
    file that is missing or broken."""
    try:
        return read_safetensors(path) if str(path).endswith(".safetensors") else read_bin(path)
    except Broken as error:
        raise UserError(f"{path}: expected named tensors, got a broken file: {visible(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror})") from error


def read_bin(path):
    """What torch.save has written of a model: names and tensors, and nothing that could be run."""
    found = read_torch(path, "named tensors", "cpu")
    if not isinstance(found, dict) or not all(isinstance(k, str) and torch.is_tensor(x)
                                              for k, x in found.items()):
        raise Broken("it holds other things than names and tensors")
    for name, x in found.items():
        plain = x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
        if not plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise Broken(f"{name}: has more numbers than are stored")
    size, asked = os.path.getsize(path), sum(x.numel() * x.element_size() for x in found.values())
    # A tied head may be the embedding once more; the same numbers a hundred times are no model.
    if asked > 2 * size:
        raise Broken(f"its tensors take {asked:,} bytes, and it has {size:,}")
    return found


def read_safetensors(path):
    """{name: tensor}. Broken for whatever does not hold what the first paragraph of this page says."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER):
            raise Broken(f"a header of {length:,} bytes in a file of {size:,} (at most {HEADER:,})")
        header = checked_header(f.read(length), size - 8 - length)
        found = {}
        for name, (dtype, shape, begin, end) in header.items():
            f.seek(8 + length + begin)
            data = bytearray(f.read(end - begin))
            if len(data) < end - begin:
                raise Broken("it ends too early")
            # an empty buffer has no numbers to look at
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            found[name] = flat.view(shape)
        return found


def checked_header(text, room):
    """The bytes of a header -> {name: (dtype, shape, begin, end)}, in the order of the file.
    room  bytes behind the header, all of which belong to one tensor each"""
    def once(pairs):
        """A json object in which no name comes twice: readers differ in which one counts."""
        names = [k for k, _ in pairs]
        if len(set(names)) < len(names):
            raise Broken("a name comes twice")
        return dict(pairs)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Broken("its header is no json") from error
    if not isinstance(header, dict):
        raise Broken("its header is no json object")
    header.pop("__metadata__", None)
    found = sorted(((name, *checked_entry(name, x)) for name, x in header.items()), key=lambda x: x[3:])
    at = 0
    for name, _, _, begin, end in found:
        if begin != at:
            raise Broken(f"{name}: {'overlaps another tensor' if begin < at else 'leaves a hole before it'}")
        at = end
    if at != room:
        raise Broken(f"its tensors take {at:,} bytes, and it has {room:,}")
    return {name: rest for name, *rest in found}


def checked_entry(name, x):
    """One entry of a header -> (dtype, shape, begin, end), the shape as large as its offsets say."""
    number = lambda n: type(n) is int and n >= 0
    numbers = lambda row, most: isinstance(row, list) and len(row) <= most and all(map(number, row))
    if not isinstance(x, dict) or not numbers(x.get("shape"), DIMENSIONS):
        raise Broken(f"{name}: expected dtype, shape and data_offsets")
    if not isinstance(x.get("dtype"), str) or x["dtype"] not in DTYPES:
        raise Broken(f"{name}: dtype: expected one of {', '.join(DTYPES)}, got {str(x.get('dtype'))[:20]}")
    dtype, shape, offsets = DTYPES[x["dtype"]], x["shape"], x.get("data_offsets")
    if not numbers(offsets, 2) or len(offsets) != 2:
        raise Broken(f"{name}: data_offsets: expected two numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:  # Python's integers: no shape is too large for them
        raise Broken(f"{name}: its shape and its data_offsets do not fit one another")
    return dtype, shape, begin, end


def write_safetensors(path, tensors):
    """{name: tensor} into a file, whole or not at all, as transformers and others read it."""
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, x in tensors.items():
        data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    write_whole(path, b"".join([len(text).to_bytes(8, "little"), text, *parts]))
