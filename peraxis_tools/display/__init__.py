"""What a user sees while a verb runs: notes, progress, and names and numbers as text."""
