"""``python -m secateur.cli.cards FOLDER``."""

import sys

from secateur.cli.cards.folder import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
