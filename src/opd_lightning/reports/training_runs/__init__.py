"""What a training run left in its folder, read and made into a report. Knows files and numbers, nothing of models."""
