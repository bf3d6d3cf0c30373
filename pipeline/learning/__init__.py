"""Learned masks: gates over the patterns of each group, trained while the weights stay frozen."""
