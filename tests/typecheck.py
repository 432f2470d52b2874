"""The checker behind every annotated call of dsv2 in the tests (see conftest.py)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As PEP 484 has it, and as readers write it: an int will do where a float is asked for.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
