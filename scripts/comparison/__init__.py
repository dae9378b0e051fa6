"""A comparison of training methods: processes that take turns, a timed Trainer, and a report."""
