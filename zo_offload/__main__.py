"""`python -m zo_offload fit ...` is `zo-offload fit ...`; without a command it is the doctor."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[1:] or ["doctor"]
    sys.exit(main())
