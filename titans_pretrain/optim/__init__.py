"""Optimizers, what decays, the learning rate, and the average of the weights."""
