"""The parity gate: model outputs, paired counts, thresholds, and the first layer where two models differ."""
