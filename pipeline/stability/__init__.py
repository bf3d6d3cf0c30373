"""How far masking or an update moves a network's outputs: norms, bounds, certificates."""
