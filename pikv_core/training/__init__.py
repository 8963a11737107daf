"""Training: model and optimizers from a recipe, the recall curriculum, the loop, exact checkpoints."""
