"""Casts on a CPU: one C++ file, compiled where it runs by the compiler that is there."""
