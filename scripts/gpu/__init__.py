"""The parts of `gpu_check.py`: one file a section, and what runs, times and reports them."""
