"""Kernels of fp4pretrain: Triton for GPUs, C++ for CPUs, cuBLASLt by ctypes. They need torch and triton only.

``quantize`` makes the copies of a matrix that GEMMs multiply; ``native``, ``block_gemm``, ``scaled_mm`` and
``cublaslt`` multiply them; the others are the fused work between GEMMs.
"""
