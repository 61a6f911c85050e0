"""The tests. Before Numba is imported it is told whether there is a GPU."""

from . import cuda_arrays as cuda_arrays
