"""What the gate holds against each other: answers, counts, thresholds, and where two models begin to differ."""
