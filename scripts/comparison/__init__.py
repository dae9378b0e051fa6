"""A comparison of training methods: a process of its own for every run, a timed Trainer, and a report."""
