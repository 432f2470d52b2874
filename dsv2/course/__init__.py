"""What a learner meets around the model: setting up a notebook, and the exercises.

In a notebook: `from dsv2.course import check`, then `check("02.3")`; likewise hint, progress, solution, use.
"""

from __future__ import annotations

from dsv2.course.page import check, hint, progress, solution, use

__all__ = ["check", "hint", "progress", "solution", "use"]
