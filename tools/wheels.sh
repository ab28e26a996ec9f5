#!/usr/bin/env bash
# Fills a folder with the wheels from which tools/install.sh installs on a machine without an index:
#
#   tools/wheels.sh FOLDER [PYTHON_VERSION [PACKAGE ...]]      here, with an index
#   WHEELS=FOLDER tools/install.sh                             there; or make install WHEELS=FOLDER
#
# They are the tested versions of constraints.txt, for PYTHON_VERSION (such as 3.12; by default that
# of $PYTHON) and the platform of this machine. PyTorch and torchvision are not among them. The
# PACKAGEs, which the other machine has already, are left out again, all but setuptools, of which
# Detectron2 needs an old version. Each is a name or name==version, so the list that
# `pip list --format=freeze` prints there will do.
set -euo pipefail
PYTHON=${PYTHON:-python3}
if [ $# = 0 ]; then
    sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p'
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
version=${2:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
cd "$(dirname "$0")/.."
pip() { "$PYTHON" -m pip "$@" --quiet --disable-pip-version-check; }
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$PYTHON" tools/constraints.py "$version" > "$constraints"

# The index has no wheels of these. They are of Python alone.
pip wheel --no-deps -c "$constraints" -w "$folder" fvcore iopath antlr4-python3-runtime==4.9.3
# shellcheck disable=SC2046
pip download --only-binary=:all: --python-version "$version" -c "$constraints" \
    --find-links "$folder" -d "$folder" -r tools/requirements.txt \
    $("$PYTHON" tools/requirements.py | grep -v timm)
# Without PyTorch, which it asks for; transformers has asked for the rest.
pip download --no-deps -c "$constraints" -d "$folder" timm
# Tagged for CPython 3.10, see tools/install.sh.
pip download --no-deps --only-binary=:all: --python-version 3.10 -d "$folder" sal-detectron2==0.7.2

for package in "${@:3}"; do
    name=$(echo "${package%%==*}" | tr .- __)
    if [ "$name" != setuptools ]; then
        find "$folder" -iname "$name-*.whl" -delete
    fi
done
echo "$(find "$folder" -name '*.whl' | wc -l) wheels for Python $version, $(du -sh "$folder" | cut -f1)"
