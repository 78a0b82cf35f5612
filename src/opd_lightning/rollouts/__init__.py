"""From prompts to graded rollouts to micro-batches. Knows no backend and no trainer."""
