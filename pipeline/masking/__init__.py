"""Pure functions from weights to masks: patterns, methods and the layer policy."""
