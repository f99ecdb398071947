"""The evaluator: answers generated in batches, every metric of the benchmark, the accuracy matrix."""
