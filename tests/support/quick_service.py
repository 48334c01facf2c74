"""A machine's service with bounds of a test's own: ``quick_service.py NAME BOUNDS``."""

from __future__ import annotations

import json
import sys

from wherry.service.__main__ import main
from wherry.service.stages import Bounds

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:2], Bounds(**json.loads(sys.argv[2]))))
