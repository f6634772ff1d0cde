"""Tests that break things: `make faults` runs all of them and writes docs/reliability.md, `make test` a part."""
