"""Files of tensors from strangers: whatever comes is refused with a reason, quickly, and never run."""

import io
import json
import pickle
import struct
import time
import zipfile
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import FormatError, KeysError, RefusedError, ShapeError, TooLargeError
from adapters_store.manifest import TensorSpec
from adapters_store.tensors import TensorLimits, check_specs, read_specs, read_tensors, write_tensors

LIMITS = TensorLimits(max_bytes=4 << 20)
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_DTYPES = ["F64", "I64", "U8", "F8_E4M3", 5, ["F32"], None]
BAD_SHAPES = [[1] * 9, [0], [-1], [1.0], [True], "1", None, {}]
BAD_OFFSETS = [[0], [0, 4, 8], [-4, 0], ["0", "4"], "04", 4]


def file_of(header: object, data: bytes = b"\0\0\0\0") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class Bomb:
    """Would be noticed if it were ever unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('the pickle was run')",)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_.\-]{1,40}", fullmatch=True).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
        ),
        max_size=5,
    )
)
def test_what_is_written_is_read_back_bit_for_bit(specs):
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in specs.items()}

    read = read_tensors(write_tensors(tensors))

    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].equal(tensor)


def test_equal_tensors_give_equal_bytes_in_whatever_order_and_layout():
    a, b = torch.randn(3, 2), torch.randn(4).half()

    assert write_tensors({"a": a, "b": b}) == write_tensors({"b": b, "a": a.T.contiguous().T})


def test_a_header_whose_length_begins_like_a_pickle_or_zip_is_read():
    for length in (0x0280, 0x4B50):  # little-endian these begin with b"\x80\x02" and b"PK"
        encoded = json.dumps({"a": ONE}).encode()
        assert list(read_tensors(file_of(encoded + b" " * (length - len(encoded))))) == ["a"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file came"),
        (b"\0\0\0", "3 bytes came"),
        (pickle.dumps(Bomb(), protocol=4), "Python pickle"),
        (pickle.dumps({"x": Bomb()}, protocol=2), "Python pickle"),
        (saved({"x": torch.zeros(2)}), "a zip archive, which is what torch.save writes"),
        (saved({"x": torch.zeros(2)}, _use_new_zipfile_serialization=False), "Python pickle"),
        (b"\x1f\x8b" + b"\0" * 40, "gzip"),
        (b"GGUF" + b"\3" * 40, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b'{"error": "not found"}', "JSON"),
        (struct.pack("<Q", 10 << 30) + b"{" + b" " * 100, "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"),
    ],
)
def test_other_files_are_refused_by_what_they_are(data, what):
    with pytest.raises(FormatError, match=f"expected a safetensors file, .*{what}.*; send one .safetensors"):
        read_tensors(data, LIMITS)


def test_a_zip_that_could_hold_paths_is_refused_unopened():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil", "x")

    with pytest.raises(FormatError, match="zip"):
        read_tensors(buffer.getvalue(), LIMITS)


@pytest.mark.parametrize("cut", [1, 4, 11, 30, 60])
def test_a_truncated_file_is_refused(cut):
    data = write_tensors({"a": torch.ones(3)})

    with pytest.raises(FormatError, match="truncated"):
        read_tensors(data[:-cut], LIMITS)


def test_trailing_bytes_are_refused():
    with pytest.raises(FormatError, match="has trailing bytes: its header promises 12 bytes of tensors, 13 came"):
        read_tensors(write_tensors({"a": torch.ones(3)}) + b"x", LIMITS)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "no JSON object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "no JSON object"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "no JSON object"),
        (b'{"\xff\xfe": 1}', "no JSON object"),
        (b'{"a": {}, "a": {}}', "'a' is given twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is given twice"),
        ({"../../etc/x": ONE}, "name '../../etc/x' is not allowed"),
        ({"a\x00b": ONE}, "is not allowed"),
        ({"": ONE}, "is not allowed"),
        ({"a\n": ONE}, "is not allowed"),
        ({"ä": ONE}, "is not allowed"),
        ({"\ud800": ONE}, "is not allowed"),
        ({"a" * 257: ONE}, "is not allowed"),
        ({"a": 1}, "must have exactly dtype, shape and data_offsets"),
        ({"a": ONE | {"more": 1}}, "must have exactly"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "must have exactly"),
        *[({"a": ONE | {"dtype": dtype}}, "convert it to one of F32, F16, BF16") for dtype in BAD_DTYPES],
        *[({"a": ONE | {"shape": shape}}, "at most 8 dimensions") for shape in BAD_SHAPES],
        *[({"a": ONE | {"data_offsets": offsets}}, "two data_offsets") for offsets in BAD_OFFSETS],
        ({"a": ONE | {"shape": [2]}}, "broken safetensors"),
        ({"a": ONE | {"shape": [2**63]}}, "broken safetensors"),
        ({"a": ONE | {"shape": [2**70]}}, "broken safetensors"),
        ({"a": ONE | {"shape": [2**32, 2**32]}}, "broken safetensors"),
        ({"a": ONE | {"data_offsets": [4, 4]}}, "broken safetensors"),
        ({"a": ONE, "b": ONE}, "broken safetensors"),
        ({"a": ONE | {"data_offsets": [0, 2**63]}}, "truncated"),
        ({"__metadata__": {"a": 1}}, "must map texts to texts"),
        ({"__metadata__": [1]}, "must map texts to texts"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_as_it_should_be_is_refused(header, message):
    with pytest.raises(FormatError, match=message):
        read_tensors(file_of(header), LIMITS)


def test_holes_and_overlaps_between_tensors_are_refused():
    for offsets in ([8, 12], [2, 6], [0, 4]):
        header = {"a": ONE, "b": ONE | {"data_offsets": offsets}, "c": ONE | {"data_offsets": [12, 16]}}
        with pytest.raises(FormatError, match="broken safetensors"):
            read_tensors(file_of(header, b"\0" * 16), LIMITS)


def test_too_much_of_anything_is_refused_as_too_large():
    many = {str(i): ONE | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(3)}
    for data, limits, message in [
        (file_of(b"{" + b" " * (1 << 20) + b"}"), LIMITS, "a header of 1048578 bytes, the limit is 1048576"),
        (file_of({"__metadata__": {"a": "x" * (16 << 10)}}), LIMITS, "__metadata__, the limit is 16384"),
        (file_of({"__metadata__": {"\ud800": "x" * (16 << 10)}}), LIMITS, "__metadata__, the limit is 16384"),
        (file_of(many, b"\0" * 12), TensorLimits(max_tensors=2), "3 tensors, the limit is 2"),
        (b"\0" * 101, TensorLimits(max_bytes=100), "101 bytes of tensors, the limit is 100"),
    ]:
        with pytest.raises(TooLargeError, match=message):
            read_tensors(data, limits)


def test_the_largest_header_allowed_is_refused_in_a_moment():
    doubled = b"{" + b",".join(b'"%d":0' % i for i in range(90_000)) + b',"1":0}'
    flat = json.dumps({"a": ONE | {"shape": [1] * 300_000}}).encode()

    for header in (doubled, flat):
        assert len(header) < LIMITS.max_header_bytes
        start = time.perf_counter()
        with pytest.raises(FormatError) as caught:
            read_tensors(file_of(header), LIMITS)
        assert time.perf_counter() - start < 2
        assert len(str(caught.value)) < 400


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(data):
    try:
        tensors = read_tensors(data, LIMITS)
    except RefusedError:
        return
    assert tensors == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", 1]) | json_values,
    "shape": json_values | st.lists(st.integers(0, 9)),
    "data_offsets": json_values | st.lists(st.integers(0, 20)),
})  # fmt: skip
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), json_values | entries, max_size=4)


@settings(deadline=None)
@given(headers, st.binary(max_size=40))
def test_any_json_header_is_read_or_refused(header, data):
    try:
        tensors = read_tensors(file_of(header, data), LIMITS)
    except RefusedError:
        return
    assert set(tensors) == set(header) - {"__metadata__"}


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(position, value):
    data = bytearray(write_tensors({"a.lora_A": torch.ones(3, 2), "b": torch.ones(2).half()}))
    data[position % len(data)] = value

    try:
        read_tensors(bytes(data), LIMITS)
    except RefusedError:
        return


def test_metadata_within_the_limit_is_allowed():
    data = safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"})

    assert read_specs(data, LIMITS) == {"a": TensorSpec(shape=(2,), dtype="float32")}


@pytest.mark.parametrize(
    "tensors",
    [{"a b": torch.ones(1)}, {"a": torch.ones(0)}, {"a": torch.ones(1).double()}, {"x" * 300: torch.ones(1)}],
)
def test_what_could_not_be_read_back_is_not_written(tensors):
    with pytest.raises(FormatError):
        write_tensors(tensors)


def test_specs_must_be_equal():
    specs = read_specs(write_tensors({"a": torch.ones(2, 3)}))

    check_specs(specs, specs)
    for expected, error, message in [
        ({}, KeysError, r"missing \[\], not in the manifest \['a'\]"),
        (specs | {"b": specs["a"]}, KeysError, r"missing \['b'\]"),
        ({"a": TensorSpec(shape=(3, 2), dtype="float32")}, ShapeError, r"float32 \(3, 2\) .* it is float32 \(2, 3\)"),
        ({"a": TensorSpec(shape=(2, 3), dtype="float16")}, ShapeError, "float16"),
    ]:
        with pytest.raises(error, match=message):
            check_specs(expected, specs)
