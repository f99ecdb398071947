"""The benchmark's data: files, prompts and images."""
