"""Inputs that nobody would send on purpose, made by seeds: see docs/fuzzing.md."""
