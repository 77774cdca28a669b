"""The CUDA path without a GPU: plans, numbers in the interpreter, and what kernels become."""
