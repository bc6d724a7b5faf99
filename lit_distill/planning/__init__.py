"""What a run needs before anything is loaded: its memory by part, the batch that fits, and its time."""
