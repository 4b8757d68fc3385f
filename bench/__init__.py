"""Speed, measured: ratios against something named, both in one run. No test is timed."""
