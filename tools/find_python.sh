#!/bin/sh
# Prints the first Python on this machine that is new enough and can make virtual environments.
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$candidate"
        exit 0
    fi
done
cat >&2 <<'TEXT'
cutaway needs Python 3.11 or newer with its venv module, and none was found on this machine.
  why: python3, python3.13, python3.12, python3.11 and python are missing, older, or without venv
  instead: install Python 3.11+ (Debian, Ubuntu: apt install python3 python3-venv), or name one: make demo PYTHON=/path/to/python3.12
TEXT
exit 1
