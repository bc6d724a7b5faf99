"""One file a command beside fit, validate, test and predict."""
