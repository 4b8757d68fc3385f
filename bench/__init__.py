"""Exactness and speed, measured: counts, and ratios against something named in the same run. No test is timed."""
