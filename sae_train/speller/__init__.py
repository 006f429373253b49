"""The embedded language model: its artificial language, its training script and its proofs."""
