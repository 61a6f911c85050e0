"""The regimes of a GPU, pinned; and what every plan must be."""

import itertools

import pytest

from . import cuda_arrays

pytestmark = pytest.mark.skipif(bool(cuda_arrays.MISSING), reason=cuda_arrays.MISSING)
if not cuda_arrays.MISSING:
    from nbsoftmax.cuda import _plan

# op, (outer, n, inner), itemsize, clusters -> threads beside each other x behind each other x
# blocks, vectors x width, threads of a block, chunks
TABLE = {
    ("softmax", (1000, 3, 1), 4, True): ("1x1x1", "1x4", 128, 0),
    ("softmax", (1000, 10, 1), 4, True): ("1x4x1", "1x4", 128, 0),
    ("softmax", (1000, 64, 1), 4, True): ("1x8x1", "2x4", 128, 0),
    ("softmax", (1000, 256, 1), 4, True): ("1x8x1", "8x4", 128, 0),
    ("softmax", (1000, 500, 1), 4, True): ("1x16x1", "8x4", 128, 0),
    ("softmax", (1000, 1000, 1), 4, True): ("1x32x1", "8x4", 128, 0),
    ("softmax", (1000, 1000, 1), 2, True): ("1x32x1", "4x8", 128, 0),
    ("softmax", (1000, 1000, 1), 8, True): ("1x64x1", "8x2", 128, 0),
    ("softmax", (1000, 2048, 1), 4, True): ("1x64x1", "8x4", 128, 0),
    ("softmax", (1000, 2048, 1), 2, True): ("1x64x1", "4x8", 128, 0),
    ("softmax", (1000, 4096, 1), 4, True): ("1x128x1", "8x4", 128, 0),
    ("softmax", (1000, 32768, 1), 4, True): ("1x1024x1", "8x4", 1024, 0),
    ("softmax", (1000, 32768, 1), 2, True): ("1x1024x1", "4x8", 1024, 0),
    ("softmax", (1000, 4096, 1), 8, True): ("1x256x1", "8x2", 256, 0),
    ("softmax", (1000, 8192, 1), 8, True): ("1x512x2", "4x2", 512, 0),
    ("softmax", (1000, 32768, 1), 8, True): ("1x512x8", "4x2", 512, 0),
    ("softmax", (1000, 8192, 1), 8, False): ("1x256x1", "4x2", 256, 1),
    ("softmax", (1000, 65536, 1), 4, True): ("1x1024x2", "8x4", 1024, 0),
    ("softmax", (1000, 262144, 1), 4, True): ("1x1024x8", "8x4", 1024, 0),
    ("softmax", (1000, 65536, 1), 4, False): ("1x256x1", "4x4", 256, 2),
    ("softmax", (1000, 262145, 1), 4, True): ("1x256x1", "4x4", 256, 2),
    ("softmax", (1, 2**26, 1), 4, True): ("1x256x1", "4x4", 256, 1024),
    ("logsumexp", (1000, 65536, 1), 4, True): ("1x256x1", "4x4", 256, 2),
    ("logsumexp", (10**4, 65536, 1), 4, True): ("1x256x1", "4x4", 256, 1),
    ("softmax", (1, 3, 10**6), 4, True): ("8x1x1", "4x4", 128, 0),
    ("softmax", (1024, 8, 256), 4, True): ("8x1x1", "8x4", 128, 0),
    ("softmax", (1024, 32, 256), 4, True): ("8x4x1", "8x4", 128, 0),
    ("softmax", (1024, 64, 256), 4, True): ("8x8x1", "8x4", 128, 0),
    ("softmax", (1, 512, 4096), 4, True): ("8x64x1", "8x4", 512, 0),
    ("softmax", (1, 4096, 4096), 4, True): ("8x32x1", "4x4", 256, 8),
    ("logsumexp", (1, 4096, 4096), 4, True): ("8x32x1", "4x4", 256, 8),
    ("softmax", (9, 64, 3), 4, True): ("2x8x1", "8x2", 128, 0),
    ("softmax", (1024, 64, 256), 2, True): ("8x16x1", "4x8", 128, 0),
    ("softmax", (1024, 128, 256), 2, True): ("8x32x1", "4x8", 256, 0),
    ("softmax", (1024, 129, 256), 2, True): ("8x32x1", "4x8", 256, 1),
    ("softmax", (1024, 256, 256), 8, True): ("8x32x1", "8x2", 256, 0),
}


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_regime(case):
    op, folded, size, clusters = case
    plan = _plan.plan(op, *folded, size, max(size, 4), clusters)
    threads = f"{plan.across}x{plan.deep}x{plan.clusters}"
    held = f"{plan.vectors}x{plan.width}"
    assert (threads, held, plan.block, plan.chunks) == TABLE[case]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("op", ["softmax", "logsumexp"])
def test_every_plan_holds_its_lanes_in_whole_warps(op, clusters, size):
    lengths = [*range(1, 40), *(2**k + d for k in range(5, 22) for d in (-1, 0, 1))]
    for n, inner, outer in itertools.product(lengths, (1, 2, 3, 7, 8, 33, 5000), (1, 70, 10**6)):
        plan = _plan.plan(op, outer, n, inner, size, max(size, 4), clusters)
        for count in (plan.across, plan.deep, plan.vectors, plan.width, plan.block):
            assert count == 1 << (count.bit_length() - 1)
        assert plan.block % 32 == 0
        assert plan.across * plan.deep <= plan.block <= 1024
        assert plan.width * size <= _plan.VECTOR_BYTES
        assert plan.clusters == 1 or clusters
        tile = plan.deep * plan.clusters * plan.vectors * (plan.width if plan.along else 1)
        if plan.chunks:
            assert plan.length % tile == 0
            assert (plan.chunks - 1) * plan.length < n <= plan.chunks * plan.length
        else:
            assert tile >= n
        assert plan.units(outer, inner) * max(1, plan.chunks) < 2**31


def test_more_lanes_than_a_grid_has_columns():
    plan = _plan.plan("softmax", 2**31, 8, 1, 4, 4, True)
    assert plan.units(2**31, 1) < 2**31


@pytest.mark.parametrize(
    ("bytes_", "expected"), [((0, 16), 4), ((8, 16), 2), ((4,), 1), ((0, 20), 1), ((), 4)]
)
def test_access_is_as_wide_as_all_bytes_allow(bytes_, expected):
    assert _plan.access(4, 4, *bytes_) == expected
