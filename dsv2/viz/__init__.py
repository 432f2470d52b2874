"""Pictures: `plots` draws numbers, `diagrams` the model and the course, `widgets` puts sliders over both."""

from __future__ import annotations

from dsv2.viz.plots import (
    cache_bars,
    cache_bytes_per_token,
    cache_growth,
    expert_heatmap,
    expert_lights,
    expert_load,
    human_bytes,
    join_routings,
    last_token,
    visible,
)
from dsv2.viz.style import describe, png, save
from dsv2.viz.widgets import Explorer, LiveGeneration, live_generation, routing_browser

__all__ = [
    "Explorer",
    "LiveGeneration",
    "cache_bars",
    "cache_bytes_per_token",
    "cache_growth",
    "describe",
    "expert_heatmap",
    "expert_lights",
    "expert_load",
    "human_bytes",
    "join_routings",
    "last_token",
    "live_generation",
    "png",
    "routing_browser",
    "save",
    "visible",
]
