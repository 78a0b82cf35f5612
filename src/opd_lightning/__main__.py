"""`python -m opd_lightning` is the `opd-lightning` command."""

import gc
import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    sys.path.append(sys.path.pop(0))  # Python puts the working folder first, where it would shadow installed packages

gc.disable()  # imports make half a million objects, all of which stay: looking for garbage among them takes 1.5 seconds

from opd_lightning.commands.cli import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
