import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from layercrit.study.packing import pack, unpack


def bits(array):
    return array.shape, array.dtype, array.view(np.uint32).tolist()


shapes = st_numpy.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=40)


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes, st.lists(st.text(max_size=8), unique=True, max_size=3))
def test_pack__every_bit_comes_back(data, shape, names):
    words = st_numpy.arrays(np.uint32, shape, elements=st.integers(0, 2**32 - 1))
    values = {name: data.draw(words).view(np.float32) for name in names}
    found = unpack(pack(values))
    assert list(found) == names
    for name, array in values.items():
        assert bits(found[name]) == bits(array)
        assert found[name].flags.writeable


def test_pack__special_values():
    words = np.array([0x7FC00000, 0x7FC12345, 0xFF812345, 0x80000000, 0x00000001, 0xFF800000], np.uint32)
    array = words.view(np.float32)  # NaNs with payloads, quiet and signalling, -0, the smallest number, -inf
    assert unpack(pack({"x": array}))["x"].view(np.uint32).tolist() == words.tolist()


def test_pack__views_that_are_not_contiguous():
    whole = np.random.default_rng(0).random((6, 8), dtype=np.float32)
    found = unpack(pack({"a": whole.T[::2], "b": whole[:, :4].T}))
    np.testing.assert_array_equal(found["a"], whole.T[::2])
    np.testing.assert_array_equal(found["b"], whole[:, :4].T)


def test_pack__distances_take_less_room_than_as_they_are():
    values = np.random.default_rng(0).beta(0.2, 2, 10_000).astype(np.float32)
    assert len(pack({"cosine": values})) < 0.95 * values.nbytes
