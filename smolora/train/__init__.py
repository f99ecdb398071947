"""Training on a stream of tasks, and evaluation after each: `smolora train RECIPE`."""
