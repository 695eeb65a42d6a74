"""The mathematics: noise levels, what a network predicts, and the loss that trains it."""
