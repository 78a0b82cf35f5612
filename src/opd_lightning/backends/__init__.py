"""The outside world: one room or file per dependency. Each offers an engine, a teacher or both."""
