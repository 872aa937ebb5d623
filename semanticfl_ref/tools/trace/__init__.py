"""The algorithm made visible: which function computes which equation, and one round watched
statement by statement while it runs.
"""
