"""Small models alike but for M, the number of devices that a token may be sent to: what the limit costs.

Chapter 07's stored runs, `data/runs/device_limit.json`. With M = 8 of 8 devices there is no limit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsv2.bench import runs
from dsv2.bench.balance import CONDITIONS, MODEL, TRAINING, with_alphas

STUDY = runs.Study(
    "device-limit",
    "M, the number of devices that a token may be sent to, of 8",
    {f"M = {m}": with_alphas(MODEL, CONDITIONS["all three"]).replace(topk_group=m) for m in (1, 2, 3, 4, 8)},
    TRAINING,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.main(STUDY, __doc__.split("\n\n")[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
