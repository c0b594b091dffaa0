"""``python -m sess_lightning``: the command line."""

from sess_lightning.cli import main

if __name__ == "__main__":
    main()
