"""``python -m longspan``, as torchrun starts it."""

from longspan.cli import main

if __name__ == "__main__":
    main()
