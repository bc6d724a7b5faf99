"""What a student said, how it is judged, and the figures of a whole split."""
