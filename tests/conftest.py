"""Makes ``tests/cases.py`` importable as ``cases``, whichever way pytest was started."""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parent)
if _TESTS not in sys.path:
    sys.path.append(_TESTS)
