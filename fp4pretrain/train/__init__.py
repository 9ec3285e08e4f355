"""The training loop, its step, optimizer and schedules, checkpoints, and hooks for all else."""
