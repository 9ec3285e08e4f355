"""How fast: kernels beside a device copy, linears beside BF16, all timed in the same run."""
