"""``python -m fp4pretrain``, and what torchrun starts."""

from fp4pretrain.cli import main

if __name__ == "__main__":
    main()
