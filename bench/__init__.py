"""Benches: each writes JSON and prints a table."""
