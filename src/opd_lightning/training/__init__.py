"""The Lightning side: `OPDModule`, `OPDDataModule`, and what they need of checks, metrics, schedules, checkpoints."""
