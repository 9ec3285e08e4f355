"""Casts on a CPU: some C++, compiled where it runs by the compiler that is there."""
