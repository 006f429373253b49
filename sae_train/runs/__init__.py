"""One run: what it takes, what it does between steps, what it leaves on disk."""
