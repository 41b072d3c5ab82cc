"""Structural pruning: from one recorded forward to a physically smaller model that is proven equal."""
