"""Comparisons: an experiment grid, its runs, and their statistics, tables and figures."""
