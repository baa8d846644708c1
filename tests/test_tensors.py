"""Files of named tensors: what is written reads back, and what a stranger may have written ends in one
line."""
import json
import struct

import pytest
import torch

from support.log import UserError
from support.tensors import DTYPES, read_tensors, write_safetensors


def file_of(path, header, data=b"", length=None):
    """A file with this header (an object, or bytes as they are) and these numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape,
            "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_and_shape_reads_back_as_it_was_written(name, tmp_path):
    whole = torch.arange(12).view(3, 4).to(DTYPES[name])
    tensors = {"whole": whole, "turned": whole.t(), "one": whole[0, 0], "none": whole[:0]}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert list(found) == list(tensors)
    for key, x in tensors.items():
        assert found[key].dtype == x.dtype and torch.equal(found[key], x)


def test_the_package_safetensors_reads_and_writes_the_same(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.randn(2).bfloat16()}
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    theirs.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    for found in (theirs.load_file(tmp_path / "ours.safetensors"),
                  read_tensors(tmp_path / "theirs.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], x) for name, x in tensors.items())


BROKEN = {
    "a header longer than the file": dict(header={}, length=1000),
    "a header of more than a hundred million bytes": dict(header={}, length=2 ** 62),
    "no json": dict(header=b"{nothing"),
    "bytes that are no text": dict(header=b"\xff\xfe"),
    "json too deep": dict(header=b"[" * 100_000),
    "a list": dict(header=[1]),
    "an entry that is a list": dict(header={"a": [1]}),
    "a type that nobody knows": dict(header={"a": entry(0, 8, dtype="F7")}, data=bytes(8)),
    "a type that is no text": dict(header={"a": entry(0, 8, dtype=[])}, data=bytes(8)),
    "a name twice": dict(header=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                                b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', data=bytes(8)),
    "tensors that overlap": dict(header={"a": entry(0, 8), "b": entry(4, 12)}, data=bytes(12)),
    "a hole": dict(header={"a": entry(0, 4), "b": entry(8, 12)}, data=bytes(12)),
    "bytes that are nobody's": dict(header={"a": entry(0, 4)}, data=bytes(8)),
    "offsets behind the end": dict(header={"a": entry(0, 400)}, data=bytes(8)),
    "offsets that go back": dict(header={"a": entry(8, 0, [0])}, data=bytes(8)),
    "offsets below zero": dict(header={"a": entry(-8, 0)}, data=bytes(8)),
    "offsets that are no whole numbers": dict(header={"a": {**entry(0, 8), "data_offsets": [0, 8.0]}},
                                              data=bytes(8)),
    "one offset": dict(header={"a": {**entry(0, 8), "data_offsets": [0]}}, data=bytes(8)),
    "a shape larger than its numbers": dict(header={"a": entry(0, 8, [10 ** 12, 10 ** 12])}, data=bytes(8)),
    "a side below zero": dict(header={"a": entry(0, 8, [-1, -2])}, data=bytes(8)),
    "a side that is true": dict(header={"a": entry(0, 4, [True])}, data=bytes(4)),
    "a thousand sides": dict(header={"a": entry(0, 4, [1] * 1000)}, data=bytes(4)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(case, tmp_path):
    path = file_of(tmp_path / "x.safetensors", **BROKEN[case])
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 7, 20, 100])
def test_a_file_that_ends_too_early_is_one_line(size, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(30)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="x.safetensors"):
        read_tensors(path)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="could not be read"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_bin_holds_names_and_tensors_and_nothing_that_runs(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    for thing in ({"a": [torch.ones(2)]}, [torch.ones(2)], {"a": print}):
        torch.save(thing, path)
        with pytest.raises(UserError, match="pytorch_model.bin: expected"):
            read_tensors(path)


def test_a_bin_whose_tensors_are_larger_than_the_file_is_one_line(tmp_path):
    path, one = tmp_path / "pytorch_model.bin", torch.ones(1000)
    torch.save({"a": one[:1].expand(10 ** 12)}, path)
    with pytest.raises(UserError, match="a: has more numbers than are stored"):
        read_tensors(path)
    torch.save({f"a{i}": one for i in range(100)}, path)
    with pytest.raises(UserError, match="its tensors take 400,000 bytes"):
        read_tensors(path)
    torch.save({"a": one.view(10, 100).t(), "tied": one}, path)
    assert read_tensors(path)["a"].shape == (100, 10)
