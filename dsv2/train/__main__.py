"""`python -m dsv2.train`."""

from __future__ import annotations

import sys

from dsv2.train.command import main

if __name__ == "__main__":
    sys.exit(main())
