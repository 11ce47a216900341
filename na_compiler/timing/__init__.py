"""Timing what is to be compared, in turn: on the CPU, and on a GPU by its own clock."""
