"""How an SAE learns: architectures, losses, L0 control, the loop."""
