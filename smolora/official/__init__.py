"""The released code's files: its checkpoints converted, and the LLaVA that they sit on put together."""
