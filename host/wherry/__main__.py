"""``python -m wherry``, and the entry of the frozen program."""

from __future__ import annotations

import sys

from wherry.service import SERVICE_ARGUMENT

if __name__ == "__main__":
    if sys.argv[1:2] == [SERVICE_ARGUMENT]:
        from wherry.service.__main__ import main as serve

        sys.exit(serve(sys.argv[2:]))
    from wherry.cli import main

    main()
