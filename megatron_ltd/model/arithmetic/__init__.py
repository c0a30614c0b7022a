"""What follows from a model's settings by plain arithmetic, without torch."""
