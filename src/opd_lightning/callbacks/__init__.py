"""What happens beside the training step, each a Lightning callback: EffOPD and its scores, samples, answers, rescue."""
