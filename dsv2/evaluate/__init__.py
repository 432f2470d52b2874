"""What a trained model can do: nats per byte by kind of text, unseen sums, experts by kind of text.

    windows = domain_windows(data.validation, seq_len=256, per_domain=64)
    reading = read(model, windows)
    nats_by_domain(reading.nats, windows.targets, windows.domains, data.domain_names)
    specialisation(reading.expert_ids[0], windows.domains, len(data.domain_names), n_experts=16)

The same from a shell, with a table and JSON: `python -m dsv2.evaluate data/tiny --out report.json`.
"""

from __future__ import annotations

from dsv2.evaluate.domains import Reading, domain_windows, nats_by_domain, read
from dsv2.evaluate.preference import (
    Specialisation,
    conditional_mutual_information,
    count_choices,
    expected_information,
    mutual_information,
    shuffled_information,
    specialisation,
)
from dsv2.evaluate.sums import SumsResult, answer_sums, held_out_sums

__all__ = [
    "Reading",
    "Specialisation",
    "SumsResult",
    "answer_sums",
    "conditional_mutual_information",
    "count_choices",
    "domain_windows",
    "expected_information",
    "held_out_sums",
    "mutual_information",
    "nats_by_domain",
    "read",
    "shuffled_information",
    "specialisation",
]
