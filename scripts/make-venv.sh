#!/bin/sh
# Make a virtual environment, or say what is missing: make-venv.sh PYTHON FOLDER
set -eu
python=$1
folder=$2

if ! command -v "$python" >/dev/null 2>&1; then
    echo "No '$python' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "napari-kaf needs Python 3.11 or newer, and '$python' is $("$python" --version 2>&1)." >&2
    echo "Install a newer one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "'$python' cannot make virtual environments: its venv module is missing." >&2
    echo "On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi
"$python" -m venv "$folder"
