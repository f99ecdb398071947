"""Facts of the models that can be tuned."""
