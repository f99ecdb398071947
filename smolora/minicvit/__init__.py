"""MiniCVIT: the benchmark in small, made in code, and a base model for it."""
