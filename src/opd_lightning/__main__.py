"""`python -m opd_lightning` is the `opd-lightning` command."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    sys.path.append(sys.path.pop(0))  # Python puts the working folder first, where it would shadow installed packages

from opd_lightning.commands.cli import main

if __name__ == "__main__":
    main()
