"""The package never harms the process it runs in: right numbers, no hang, no abort.

Every scenario is a function of process_scenarios.py, run in a process of its own; what it computes
and how that is judged is in process_child.py.
"""

import pytest

from . import process_parent

pytestmark = pytest.mark.slow
LAYERS = ("omp", "tbb", "workqueue")
UNDER_EVERY_LAYER = ("many_threads", "inside_users_prange", "fork_after_users_parallel_code")
SCENARIOS = (
    "first_calls_from_many_threads",
    "set_num_threads",
    "no_thread_can_start",
    "called_in_signal_handlers",
    "interrupted",
    "ends_after_a_call",
    "ends_during_calls",
    "first_call_at_exit",
    "thread_outlives_main",
    "fork_before_any_call",
    "fork_among_calls",
    "forked_child_ends_normally",
    "multiprocessing_fork",
    "multiprocessing_forkserver",
    "multiprocessing_spawn",
    "futures_of_processes",
    "futures_of_threads",
    "joblib_loky",
    "joblib_multiprocessing",
    "joblib_threading",
    "dask_threads",
    "dask_processes",
)
REPEATED = {"ends_during_calls": 3}
NEEDS = {"joblib": "joblib", "dask": "dask"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scenario", UNDER_EVERY_LAYER)
def test_right_beside_users_parallel_code(scenario, layer):
    reason = process_parent.missing(layer)
    if reason:
        pytest.skip(reason)
    process_parent.run_scenario(scenario, NUMBA_THREADING_LAYER=layer)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_never_harms_the_process(scenario):
    package = NEEDS.get(scenario.partition("_")[0])
    if package:
        pytest.importorskip(package)
    for _ in range(REPEATED.get(scenario, 1)):
        process_parent.run_scenario(scenario)


@pytest.mark.parametrize(
    ("settings", "scenario"),
    [
        ({"NUMBA_NUM_THREADS": "1"}, "one_thread"),
        ({"NUMBA_NUM_THREADS": "64"}, "plain"),
        ({"NUMBA_THREADING_LAYER": "tbb", "LD_LIBRARY_PATH": None}, "plain"),
        ({"NUMBA_THREADING_LAYER": "no_such_layer"}, "plain"),
        ({"NUMBA_DISABLE_JIT": "1"}, "without_jit"),
        ({"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}, "as_another_cpu"),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}, "as_another_cpu"),
        ({"NUMBA_BOUNDSCHECK": "1"}, "two_kernels"),
        ({"NUMBA_OPT": "0"}, "as_another_cpu"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_right_under_settings_of_numba(settings, scenario):
    process_parent.run_scenario(scenario, **settings)
