"""The tasks: text, preferences and scores. train.py asks a task for all three and knows none of them by name."""
