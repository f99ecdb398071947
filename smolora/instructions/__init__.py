"""Instructions and their embeddings: what the IF experts are routed by (Eq. 6)."""
