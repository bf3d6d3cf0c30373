"""What every room builds on: records, verdicts, errors, files, progress, interrupts, JSON and JUnit."""
