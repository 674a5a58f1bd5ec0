"""The benchmark: this program beside what operators would run in its place, on the same work in one
run. `make bench` runs it.
"""
