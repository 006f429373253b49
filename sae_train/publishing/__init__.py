"""SAEs for others: cards, curves, uploads to the hub."""
