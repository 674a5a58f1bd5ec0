"""The same features of the program, tried on several S3 servers; `make test-stores` runs it."""
