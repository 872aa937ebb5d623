"""Recorded runs as pages and figures. Nothing here imports torch."""
