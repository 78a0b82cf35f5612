"""`python -m opd_lightning` is the `opd-lightning` command."""

from opd_lightning.commands.cli import main

if __name__ == "__main__":
    main()
