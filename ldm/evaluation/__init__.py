"""What a model's pictures are worth, in numbers that say what they depend on."""
