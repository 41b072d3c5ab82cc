"""Sparsity that is found while the network trains: weights made from others, and masks that move."""
