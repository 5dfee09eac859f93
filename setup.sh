#!/bin/sh
# Makes .venv with Python 3.11 and installs the locked requirements; a second run installs nothing.
#   ./setup.sh          what training needs
#   ./setup.sh --dev    and what the tests need
# PYTHON=/path/to/python3.11 ./setup.sh takes that interpreter.
set -eu
cd "$(dirname "$0")"

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

for candidate in "${PYTHON:-}" .venv/bin/python python3.11 python3 python; do
    if [ -n "$candidate" ] && is_311 "$candidate"; then
        exec "$candidate" .ci/install.py "$@"
    fi
done
echo "setup.sh: Python 3.11 was not found (looked for python3.11, python3 and python on the PATH)." >&2
echo "Install it with your system's package manager or pyenv, or name it: PYTHON=/path/to/python3.11 ./setup.sh" >&2
exit 1
