"""Operators as standard torch operators, for programs that run where this package is not installed.

Each module has `forward`, which takes the arguments of the canonical operator and returns what it returns, save for the
checkpoints of a backward pass: what is exported only predicts. `_loop.py` alone knows how a loop over any number of
steps becomes a part of an exported program.
"""
