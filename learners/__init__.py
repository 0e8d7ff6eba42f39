"""Sequence models assembled from the layers below."""
