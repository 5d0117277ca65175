"""``python -m flowaug`` is the command ``flowaug``."""

from flowaug.cli.main import main

if __name__ == "__main__":
    main()
