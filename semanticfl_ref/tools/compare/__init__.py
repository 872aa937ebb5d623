"""Comparisons: the runs of a grid and the statistics over them."""
