"""Pictures: `plots` draws numbers, `diagrams` the model and the course, `widgets` puts sliders over both."""

from __future__ import annotations

from dsv2.viz.cache import (
    attention_intensity,
    cache_calculator,
    decode_roofline,
    decode_work,
    head_sharing,
    memory_bars,
    published_cache,
    step_times,
    visible_keys,
)
from dsv2.viz.diagrams import chapters_here, course_map, model_diagram
from dsv2.viz.latent import latent_explorer, latent_sizes, loss_against_cache, rank_curves
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
from dsv2.viz.roofline import forms_crossing, forms_times, roofline_explorer, two_forms
from dsv2.viz.rope import (
    absorption_errors,
    channel_layouts,
    pair_cosines,
    position_losses,
    rope_clocks,
    rope_wavelengths,
    rotation_clocks,
)
from dsv2.viz.style import describe, png, save
from dsv2.viz.widgets import Explorer, LiveGeneration, live_generation, routing_browser

__all__ = [
    "Explorer",
    "LiveGeneration",
    "absorption_errors",
    "attention_intensity",
    "benchmark_bars",
    "cache_bars",
    "cache_bytes_per_token",
    "cache_calculator",
    "cache_growth",
    "channel_layouts",
    "chapters_here",
    "course_map",
    "decode_roofline",
    "decode_work",
    "describe",
    "expert_heatmap",
    "expert_lights",
    "expert_load",
    "expert_preferences",
    "forms_crossing",
    "forms_times",
    "head_sharing",
    "human_bytes",
    "join_routings",
    "last_token",
    "latent_explorer",
    "latent_sizes",
    "live_generation",
    "loss_against_cache",
    "memory_bars",
    "model_diagram",
    "pair_cosines",
    "png",
    "position_losses",
    "published_cache",
    "rank_curves",
    "roofline_explorer",
    "rope_clocks",
    "rope_wavelengths",
    "rotation_clocks",
    "routing_browser",
    "save",
    "step_times",
    "training_curves",
    "two_forms",
    "visible",
    "visible_keys",
]
