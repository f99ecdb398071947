"""The models that can be tuned: facts of their families, and how each is given conversations and images."""
