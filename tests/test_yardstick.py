"""What speed is measured against does what it says."""

import numpy as np
import pytest

from nbsoftmax import _cpu


@pytest.mark.parametrize("items", [0, 1, 3, 63, 8193, 300_001, 4_500_001])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
def test_the_copy_copies_every_byte(items, dtype):
    x = np.random.default_rng(items).integers(0, 256, items * np.dtype(dtype).itemsize, np.uint8)
    out = np.zeros_like(x)
    _cpu.yardstick(x.view(dtype), out.view(dtype))()
    np.testing.assert_array_equal(out, x)


def test_reading_takes_any_size():
    for items in (0, 1, 8193, 1_000_001):
        _cpu.yardstick(np.zeros(items, np.float32), None)()
