"""Models: names to modules, checkpoints, layers, BatchNorm statistics, the bundled digits_resnet."""
