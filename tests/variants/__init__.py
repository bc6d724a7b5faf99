"""Methods as a user would write them: nothing of the package is changed."""
