"""A page to ask the models of finished runs on: every stage and method answers side by side."""
