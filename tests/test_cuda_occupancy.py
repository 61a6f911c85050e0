"""The launch table against the model it follows from, benchmarks/occupancy.py; compiles nothing."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
occupancy = importlib.import_module("occupancy")
REPORT = occupancy.load("nvcc")
KERNELS = [
    pytest.param(kernel, id=f"{architecture} {name}")
    for architecture, made in occupancy.kernels(REPORT).items()
    for name, kernel in made.items()
]


# As NVIDIA's occupancy calculator has it: registers, threads, bytes -> blocks.
@pytest.mark.parametrize(
    ("architecture", "block", "resident"),
    [
        ("sm_90", (64, 256, 0), 4),
        ("sm_90", (65, 256, 0), 3),  # in steps of 8
        ("sm_90", (32, 128, 0), 16),
        ("sm_90", (16, 32, 0), 32),
        ("sm_90", (64, 1024, 0), 1),
        ("sm_90", (72, 1024, 0), 0),
        ("sm_90", (32, 128, 100 * 1024), 2),
        ("sm_75", (32, 128, 0), 8),
        ("sm_75", (64, 512, 32 * 1024), 2),
        ("sm_120", (32, 128, 0), 12),
        ("sm_120", (40, 1024, 0), 1),
    ],
)
def test_resident_blocks(architecture, block, resident):
    assert occupancy.GPUS[architecture].resident(*block) == resident


def test_the_plan_has_the_tiles_that_the_model_prefers():
    differ = [
        (tiles.form, n, wanted, has)
        for tiles, n, wanted, has in occupancy.choices(REPORT)
        if wanted != has
    ]
    assert differ == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_let_the_blocks_reside_that_memory_needs(kernel):
    alone = 2 * kernel.plan.block > kernel.gpu.threads or kernel.plan.block == 1024
    assert kernel.blocks >= (1 if alone else occupancy.BLOCKS)
    if not alone:
        assert kernel.flight(kernel.asked) >= kernel.needed


def test_instructions_are_those_of_the_kernels_that_they_were_fitted_to():
    tiles = occupancy.Tiles(REPORT, "float32", along=True)
    read = occupancy.kernels(REPORT).values()
    made = [kernels["softmax_whole_float32_4096x4096x1"] for kernels in read]
    counted = sum(kernel.code["per_number"] for kernel in made) / len(made)
    assert tiles.instructions(made[0].plan, 4096) == pytest.approx(counted, rel=0.05)
