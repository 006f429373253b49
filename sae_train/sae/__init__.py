"""The finished SAE: what it computes, and its files in every layout."""
