"""The model on GPUs: Triton kernels between cuBLAS products."""
