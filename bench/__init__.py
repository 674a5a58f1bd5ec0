"""The benchmark: this program beside what operators would run in its place. See `make bench`."""
