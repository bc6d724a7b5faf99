"""What a teacher is asked about a dataset's rows, what is kept of its answers, and what is known of each of them."""
