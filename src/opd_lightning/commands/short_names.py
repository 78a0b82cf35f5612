"""Rooms whose classes have short names in YAML."""

from importlib import import_module

ROOMS = (  # `HFStudent` works in YAML for the whole path, but only once its room was imported
    "backends.hf",
    "backends.vllm.colocated",
    "backends.vllm.server",
    "callbacks.effopd",
    "callbacks.effopd_scores",
    "callbacks.entropy_gate",
    "callbacks.guards",
    "callbacks.samples",
    "callbacks.source_metrics",
    "callbacks.held_out_loss",
    "callbacks.held_out_marks",
    "callbacks.learning_rate_search",
    "callbacks.live_report",
    "callbacks.mismatch",
    "callbacks.projected_gradients",
    "callbacks.token_recorder",
    "callbacks.update_recorder",
    "methods",
    "objectives",
    "rollouts.horizon",
    "rollouts.mixed_data",
    "rollouts.one_step_ahead",
    "rollouts.plain_engine",
    "rollouts.reuse",
    "rollouts.stored",
    "rollouts.teacher_mixed",
    "rollouts.tool_use",
    "sandbox.calculator",
    "training.schedules",
    "selection",
    "tasks",
    "teachers",
)


def import_rooms() -> None:
    """Make `HFStudent` do for its whole path: jsonargparse knows the subclasses of what has been imported."""
    for room in ROOMS:
        import_module(f"opd_lightning.{room}")
