"""A trained student behind HTTP, on LitServe: rows of all requests in batches, limits, health and metrics."""
