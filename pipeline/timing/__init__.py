"""Interleaved latency measurements of two or three engines."""
