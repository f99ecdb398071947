"""The benchmark's data: its files, its prompts and its images."""
