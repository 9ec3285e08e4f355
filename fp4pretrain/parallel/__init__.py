"""Process groups, seeds, and the bridge that lets megatron-core run without CUDA."""
