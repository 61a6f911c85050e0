"""The same functions on CUDA device arrays."""
