"""Backward for Hopper (sm_90a): a sweep over keys for the queries' gradient, and one over queries for the keys'."""
