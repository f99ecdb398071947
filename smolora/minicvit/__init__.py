"""MiniCVIT: a small synthetic version of the benchmark, and a base model for it."""
