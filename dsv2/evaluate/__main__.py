"""`python -m dsv2.evaluate`: what a trained model can do, as a table and as JSON."""

from __future__ import annotations

import sys

from dsv2.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
