"""What this repository promises, tested from outside: programs are run as a user does, and what they leave is seen.

Nothing here knows the inside of `common`: only command lines, exit statuses, files, printed files and flags, and the
four names that every script defines (Recipe, data, build, optimize). `make test` runs a part, `make faults` all of it.
"""
