"""The `opd-lightning` command."""
