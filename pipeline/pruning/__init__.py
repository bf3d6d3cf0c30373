"""From masks to weights: choose masks, bake them in, convert unstructured sparsity to N:M."""
