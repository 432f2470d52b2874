"""Pictures: `plots` draws numbers, `diagrams` the model and the course, `widgets` puts sliders over both."""

from __future__ import annotations

from dsv2.viz.diagrams import chapters_here, course_map, model_diagram
from dsv2.viz.plots import (
    benchmark_bars,
    cache_bars,
    cache_bytes_per_token,
    cache_growth,
    expert_heatmap,
    expert_lights,
    expert_load,
    expert_preferences,
    human_bytes,
    join_routings,
    last_token,
    training_curves,
    visible,
)
from dsv2.viz.style import describe, png, save
from dsv2.viz.widgets import Explorer, LiveGeneration, live_generation, routing_browser

__all__ = [
    "Explorer",
    "LiveGeneration",
    "benchmark_bars",
    "cache_bars",
    "cache_bytes_per_token",
    "cache_growth",
    "chapters_here",
    "course_map",
    "describe",
    "expert_heatmap",
    "expert_lights",
    "expert_load",
    "expert_preferences",
    "human_bytes",
    "join_routings",
    "last_token",
    "live_generation",
    "model_diagram",
    "png",
    "routing_browser",
    "save",
    "training_curves",
    "visible",
]
