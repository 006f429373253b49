"""From documents to shuffled batches of activations."""
