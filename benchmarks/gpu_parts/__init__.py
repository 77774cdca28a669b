"""The parts of benchmarks/gpu.py, a file each."""
