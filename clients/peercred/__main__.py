"""``python -m peercred`` is the command ``peercred``."""

from peercred.cli.main import main

if __name__ == "__main__":
    main()
